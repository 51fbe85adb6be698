"""Open versions as releases see them: what opens and asks them, and who answers whom."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from compression.releases.aliases import Release
from inference.errors import InferenceError
from inference.releases.routing import Split
from inference.releases.shadow import Shadow
from inference.types import RankedList, RankRequest

Answers = list[RankedList | InferenceError]


class Opened(Protocol):
    """An open version; `inference.plane.Version` is one."""

    @property
    def version(self) -> str: ...
    @property
    def engine(self) -> str: ...


class Versions(Protocol):
    """What opens, asks and frees versions; `inference.plane.Plane` is one."""

    async def open(self, registry_root: Path, version: str, *, sha256: str | None = None) -> Any: ...
    async def rank(self, requests: Sequence[RankRequest], version: Any) -> Answers: ...
    async def rehearse(self, requests: Sequence[RankRequest], version: Any) -> Answers: ...
    async def retire(self, version: Any) -> None: ...
    async def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class Held:
    """An open version, and how much is asked of it. `release` says which bytes it was made from."""

    release: Release
    opened: Any
    opened_s: float = 0.0  # how long that took
    checked: bool = False  # has ranked recent requests, or served before
    asked: int = 0
    failures: int = 0  # as canary, in a row
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def version(self) -> str:
        return self.release.version


@dataclass(frozen=True, slots=True)
class Arms:
    """Who answers. Replaced as a whole: a unit of requests sees one state of affairs."""

    serving: Held | None = None
    canary: Held | None = None
    split: Split | None = None
    shadow: Shadow | None = None
    shadowing: Held | None = None

    def stage(self, held: Held) -> str | None:
        """Whom a version answers: one of serving, canary, shadow, or nobody."""
        arms = {"serving": self.serving, "canary": self.canary, "shadow": self.shadowing}
        return next((stage for stage, arm in arms.items() if arm is held), None)
