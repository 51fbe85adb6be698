"""What goes into the ranker and what comes out. Frozen, numpy, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy.typing as npt

Priority = Literal["high", "normal", "low"]
Graph = Literal["encode", "score", "rank", "append"]
Tensors = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class RankRequest:
    """One list to be made. `sequence` is the packed value (`features.sequence`), None without history.

    `candidates` None means "find them"; a tuple ranks exactly those. `deadline_s` is on the event
    loop's monotonic clock; None is no deadline. `tier` is the user's service tier, 0 the lowest
    (`inference.admission`): within a priority the higher one goes first.
    """

    user_id: int
    sequence: bytes | None
    k: int = 10
    candidates: tuple[int, ...] | None = None
    exclude: tuple[int, ...] = ()
    priority: Priority = "normal"
    deadline_s: float | None = None
    tier: int = 1


@dataclass(frozen=True, slots=True)
class RankedList:
    """Best first: items int64 [n], scores float32 [n], sources (names) [n], with n at most k."""

    items: list[int]
    scores: list[float]
    sources: list[str]
    model_version: str
    engine: str
    timings_ms: dict[str, float] = field(default_factory=dict)
