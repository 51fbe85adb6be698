"""Where clicks to learn from come from. A source says afterwards exactly what it read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from compression.logs.dataset import Log, read_log
from compression.releases.provenance import sha256_of


class Source(Protocol):
    """Something that can be read whole, within `max_events` in memory."""

    def read(self, max_events: int, progress: Callable[[float], None]) -> Log: ...

    def provenance(self) -> dict[str, Any]:
        """What was read, in plain values, so that it can be read again; after `read`."""
        ...


@dataclass(frozen=True, slots=True)
class LogFile:
    """A log in a file, Taobao's or item lists."""

    path: Path

    def read(self, max_events: int, progress: Callable[[float], None]) -> Log:
        return read_log(self.path, max_events=max_events, progress=progress)

    def provenance(self) -> dict[str, Any]:
        return {"log": self.path.name, "sha256": sha256_of(self.path)}
