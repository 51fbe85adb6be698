"""A plane whose versions answer what a test says, and a registry of versions that compute nothing."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from compression.errors import ArtefactInvalid
from compression.releases.registry import Registry
from inference.errors import EngineFailed, ModelUnavailable
from inference.types import RankedList, RankRequest
from tests.compression.versions import registry_of

__all__ = ["FakePlane", "FakeVersion", "registry_of", "request"]


@dataclass(eq=False)
class FakeVersion:
    version: str
    engine: str = "fake"
    asked: list[RankRequest] = field(default_factory=list)
    rehearsed: list[RankRequest] = field(default_factory=list)
    freed: bool = False


@dataclass
class FakePlane:
    """Every list is the first k items. `broken`, `short` and `nan` versions are not well, `missing` ones
    cannot be opened, and `hold` keeps every answer waiting."""

    opened: dict[str, FakeVersion] = field(default_factory=dict)
    retired: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    short: set[str] = field(default_factory=set)
    nan: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    hold: asyncio.Event | None = None
    opens: int = 0
    closed: bool = False

    async def open(self, registry_root, version, *, sha256=None):
        if version in self.missing:
            raise ModelUnavailable(f"{version}: it is damaged")
        try:
            Registry(registry_root).open(version, sha256=sha256)
        except ArtefactInvalid as error:
            raise ModelUnavailable(str(error)) from error
        self.opens += 1
        self.opened[version] = FakeVersion(version)
        return self.opened[version]

    async def rank(self, requests, version):
        assert not version.freed, "asked after it was freed"
        version.asked.extend(requests)
        if self.hold is not None:
            await self.hold.wait()
        return self._answers(requests, version)

    async def rehearse(self, requests, version):
        version.rehearsed.extend(requests)
        return self._answers(requests, version)

    async def retire(self, version):
        self.retired.append(version.version)
        version.freed = True
        if self.opened.get(version.version) is version:
            del self.opened[version.version]

    async def close(self):
        self.closed = True

    def _answers(self, requests, version):
        name = version.version
        if name in self.broken:
            return [EngineFailed("it fell over") for _ in requests]
        score = float("nan") if name in self.nan else 1.0
        return [_list(name, 1 if name in self.short else request.k, score) for request in requests]


def _list(version, count, score):
    scores = [score / (place + 1) for place in range(count)]
    return RankedList(list(range(count)), scores, ["retrieval"] * count, version, "fake")


def request(user_id, **fields):
    return RankRequest(user_id, None, **{"k": 3, **fields})
