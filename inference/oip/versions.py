"""The released versions a server has open: lists and graphs of each, found by its name.

`inference.releases` says which versions these are and which of them an empty version means.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from inference.errors import InferenceError
from inference.oip.gate import Gate
from inference.oip.graph_models import GraphSet
from inference.oip.list_model import ListModel
from inference.oip.models import Catalogue, ServedModel
from inference.plane import Plane, Version
from inference.settings import InferenceSettings
from inference.types import RankedList, RankRequest


@dataclass(frozen=True, slots=True, eq=False)
class Open:
    """One version on the plane, its graphs, and what the catalogue has of both."""

    lists: Version
    graphs: GraphSet
    models: Sequence[ServedModel]

    @property
    def version(self) -> str:
        return self.lists.version

    @property
    def engine(self) -> str:
        return self.lists.engine


class Versions:
    """What `inference.releases` opens, asks and frees; while a version is open the catalogue has it."""

    def __init__(self, plane: Plane, settings: InferenceSettings, catalogue: Catalogue, gate: Gate) -> None:
        self._plane = plane
        self._settings = settings
        self._catalogue = catalogue
        self._gate = gate
        self._open: list[Open] = []

    async def open(self, registry_root: Path, version: str, *, sha256: str | None = None) -> Open:
        """Verify, load and warm lists and graphs. Raises `ModelUnavailable` with the reason."""
        lists = await self._plane.open(registry_root, version, sha256=sha256)
        try:
            graphs = await asyncio.to_thread(GraphSet.open, registry_root, version, self._settings)
        except BaseException:
            await self._plane.retire(lists)
            raise
        by_name = ListModel(lambda: version, self._gate.lists(partial(self._rank, lists)))
        for model in graphs.models:
            model.run = self._gate.graph(model.run)
        opened = Open(lists, graphs, [by_name, *graphs.models])
        self._open.append(opened)
        self._catalogue.add(opened.models)
        return opened

    async def rank(self, requests: Sequence[RankRequest], version: Open) -> list[RankedList | InferenceError]:
        return await self._plane.rank(requests, version.lists)

    async def rehearse(
        self, requests: Sequence[RankRequest], version: Open
    ) -> list[RankedList | InferenceError]:
        return await self._plane.rehearse(requests, version.lists)

    async def retire(self, version: Open) -> None:
        """Let nobody find a version any more, finish what it has accepted, and free it."""
        self._catalogue.remove(version.models)
        if version in self._open:
            self._open.remove(version)
        await asyncio.gather(self._plane.retire(version.lists), version.graphs.close())

    async def close(self) -> None:
        while self._open:
            await self.retire(self._open[-1])
        await self._plane.close()

    async def _rank(
        self, lists: Version, requests: Sequence[RankRequest], known: bool
    ) -> list[RankedList | InferenceError]:
        return await self._plane.rank(requests, lists)
