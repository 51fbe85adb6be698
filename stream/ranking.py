"""The serving model of a worker: lists while there is one, and the next version without a gap.

A version is loaded, verified and warmed beside the one that serves; then one assignment switches
requests over, and the old one finishes what it has accepted before it is freed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from compression.registry import ArtefactInvalid, Registry
from features.settings import FeatureSettings
from features.statistics import ItemStatistics
from inference.errors import InferenceError, ModelUnavailable
from inference.plane import Plane, Version
from inference.settings import InferenceSettings
from inference.types import RankedList, RankRequest

log = logging.getLogger(__name__)


class ServingModel:
    """What `stream.recommend` ranks with. Without a model every answer is `ModelUnavailable`, which the
    request path turns into what is popular: a new shop has lists before its first training."""

    def __init__(
        self,
        registry: Path,
        alias: str,
        statistics: ItemStatistics,
        settings: InferenceSettings,
        features: FeatureSettings,
    ) -> None:
        self._registry = registry
        self._alias = alias
        self.plane = Plane(settings, features, statistics)
        self._serving: Version | None = None
        self._loading = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def version(self) -> str | None:
        return self._serving.version if self._serving else None

    @property
    def engine(self) -> str | None:
        return self._serving.engine if self._serving else None

    async def rank(self, requests: Sequence[RankRequest]) -> list[RankedList | InferenceError]:
        serving = self._serving
        if serving is None:
            return [ModelUnavailable("no model has been released yet")] * len(requests)
        return await self.plane.rank(requests, serving)

    async def load(self, announced: str | None = None, sha256: str | None = None) -> bool:
        """Serve what the alias names now; if that is what was announced, with the announced checksum.

        An announcement read late, after a restart say, does not bring an old version back. False
        where the version serves already or cannot: the one before it goes on, and the log says why.
        """
        async with self._loading:
            try:
                version = await asyncio.to_thread(Registry(self._registry).resolve, self._alias)
                if version == self.version:
                    return False
                if announced not in (None, version):
                    log.info("%s was announced; %r stands for %s by now", announced, self._alias, version)
                    sha256 = None
                opened = await self.plane.open(self._registry, version, sha256=sha256)
            except (ArtefactInvalid, InferenceError, FileNotFoundError, KeyError) as error:
                log.warning("%s is not served: %s", announced or f"alias {self._alias!r}", error)
                return False
            except Exception:
                # Whatever a library makes of damaged files, the version that serves goes on serving.
                log.exception("%s is not served", announced or f"alias {self._alias!r}")
                return False
            before, self._serving = self._serving, opened
            log.info("Serving %s on %s", opened.version, opened.engine)
        if before is not None:
            task = asyncio.create_task(self.plane.retire(before))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        return True

    async def close(self) -> None:
        if self._retiring:
            await asyncio.wait(self._retiring)
        self._serving = None
        await self.plane.close()
