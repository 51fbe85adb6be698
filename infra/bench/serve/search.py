"""The highest rate an arm keeps up with, found in steps on one grid of rates that all arms share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

GOAL_MS: Final = 50.0
_FIRST: Final = 20.0  # lists per second
_RATIO: Final = 1.08


@dataclass(frozen=True, slots=True)
class Step:
    """One rate, offered for some seconds. Latencies are from the time a request was due; one that got no
    answer counts as never. `lists_per_s` is what was offered, `goodput` what came within `GOAL_MS`."""

    lists_per_s: float
    goodput: float
    requests: int
    failed: int
    p50_ms: float
    p99_ms: float
    behind_p99_ms: float
    client_cpu_us: float = 0.0
    server_cpu_us: float = 0.0

    def with_server_cpu_us(self, server_cpu_us: float) -> Step:
        return replace(self, server_cpu_us=server_cpu_us)

    @classmethod
    def together(cls, parts: Sequence[Step]) -> Step:
        """What several processes offered at once; the latencies are those of the slowest."""
        answered = [max(1, part.requests - part.failed) for part in parts]
        return cls(
            lists_per_s=sum(part.lists_per_s for part in parts),
            goodput=sum(part.goodput for part in parts),
            requests=sum(part.requests for part in parts),
            failed=sum(part.failed for part in parts),
            p50_ms=max(part.p50_ms for part in parts),
            p99_ms=max(part.p99_ms for part in parts),
            behind_p99_ms=max(part.behind_p99_ms for part in parts),
            client_cpu_us=sum(part.client_cpu_us * count for part, count in zip(parts, answered, strict=True))
            / sum(answered),
        )

    @property
    def kept_up(self) -> bool:
        return self.p99_ms <= GOAL_MS


def rate(place: int) -> float:
    """Lists per second at a place of the grid."""
    return _FIRST * _RATIO**place


def place_of(lists_per_s: float) -> int:
    """The place of the grid's highest rate that is not above this."""
    place = 0
    while rate(place + 1) <= lists_per_s:
        place += 1
    return place


class Search:
    """For the highest place whose step keeps up, or one less than `within` below it.

    Strides from `start` until one step keeps up and a higher one does not, then halves the way between.
    A step does not keep up if it fails `tries` times: a machine has other things to do, too, and what it
    does for a tenth of a second is a p99. Who searches offers the rate at `place` and hands over what came
    of it, until `place` is None; several searches may so take their steps in turn. `found` is the highest
    place that kept up by then, and its step.
    """

    def __init__(self, *, start: int, stride: int, within: int = 1, tries: int = 3) -> None:
        self.place: int | None = max(0, start)
        self.found: tuple[int, Step] | None = None
        self._stride = stride
        self._within = within
        self._tries = tries
        self._failed = 0  # at this place
        self._above: int | None = None  # the lowest place that did not keep up

    def take(self, step: Step) -> None:
        """What came of the rate at `place`."""
        assert self.place is not None
        if step.kept_up:
            self.found = (self.place, step)
        else:
            self._failed += 1
            if self._failed < self._tries:
                return
            self._above = self.place
        self._failed = 0
        self.place = self._next()

    def _next(self) -> int | None:
        if self.found is None:
            assert self._above is not None
            place, self._stride = max(0, self._above - self._stride), 2 * self._stride
            return place if self._above else None
        low = self.found[0]
        if self._above is None:
            return low + self._stride
        return (low + self._above) // 2 if self._above - low > self._within else None
