"""The released versions a server has open: lists and graphs of each, one that an empty version means."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from compression.registry import ArtefactInvalid, Registry
from inference.errors import InferenceError, InvalidRequest, ModelNotFound, ModelUnavailable, Overloaded
from inference.oip.graph_models import GraphSet
from inference.oip.list_model import ListModel
from inference.oip.models import Catalogue
from inference.plane import Plane, Version
from inference.settings import InferenceSettings
from inference.types import RankedList, RankRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Open:
    version: Version
    graphs: GraphSet
    loaded_s: float


class Versions:
    """Loads and unloads, one at a time, while the catalogue serves."""

    def __init__(
        self,
        registry: Path,
        plane: Plane,
        settings: InferenceSettings,
        catalogue: Catalogue,
        *,
        max_versions: int = 4,
    ) -> None:
        self._registry = registry
        self._plane = plane
        self._settings = settings
        self._catalogue = catalogue
        self._max_versions = max_versions
        self._open: dict[str, _Open] = {}
        self._changing = asyncio.Lock()

    def listed(self) -> list[dict[str, object]]:
        """For people and programs: each version, whether it serves, and how long loading it took."""
        return [
            {
                "version": name,
                "serving": name == self._catalogue.serving,
                "engine": opened.version.engine,
                "loaded_s": round(opened.loaded_s, 3),
            }
            for name, opened in sorted(self._open.items())
        ]

    async def load(self, alias: str, *, sha256: str | None = None, serve: bool = True) -> str:
        """Verify, load and warm a version or what an alias stands for, and say which it was.

        Whoever asks for no version gets it from now on, if `serve`. Raises `ModelUnavailable` with the
        reason; what served before goes on serving.
        """
        async with self._changing:
            version = await asyncio.to_thread(self._resolve, alias)
            if version not in self._open:
                if len(self._open) >= self._max_versions:
                    raise Overloaded(f"{len(self._open)} versions are loaded already: unload one")
                self._open[version] = opened = await self._load(version, sha256)
                lists = ListModel(version, partial(self._rank, opened.version))
                self._catalogue.add([lists, *opened.graphs.models])
            if serve:
                self._catalogue.serve(version)
                log.info("Serving %s", version)
            return version

    async def unload(self, version: str) -> None:
        """Finish what a version has accepted, and free it. The one that serves stays."""
        async with self._changing:
            if version not in self._open:
                raise ModelNotFound(f"version {version[:64]!r} is not loaded")
            if version == self._catalogue.serving:
                raise InvalidRequest(f"{version} serves: load another one first")
            self._catalogue.remove(version)
            await self._free(self._open.pop(version))
            log.info("Unloaded %s", version)

    async def close(self) -> None:
        async with self._changing:
            while self._open:
                version, opened = self._open.popitem()
                self._catalogue.remove(version)
                await self._free(opened)
            await self._plane.close()

    def _resolve(self, alias: str) -> str:
        try:
            return Registry(self._registry).resolve(alias)
        except ArtefactInvalid as error:
            raise ModelUnavailable(str(error)) from error

    async def _load(self, version: str, sha256: str | None) -> _Open:
        started_s = time.perf_counter()
        opened = await self._plane.open(self._registry, version, sha256=sha256)
        try:
            graphs = await asyncio.to_thread(GraphSet.open, self._registry, version, self._settings)
        except BaseException:
            await self._plane.retire(opened)
            raise
        return _Open(opened, graphs, time.perf_counter() - started_s)

    async def _rank(
        self, version: Version, requests: Sequence[RankRequest]
    ) -> list[RankedList | InferenceError]:
        return await self._plane.rank(requests, version)

    async def _free(self, opened: _Open) -> None:
        await asyncio.gather(self._plane.retire(opened.version), opened.graphs.close())
