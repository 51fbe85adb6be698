"""How many lists may be in hand, found out by how long they wait.

Nothing is limited until lists wait longer than the target, or the event loop lags more than its own.
Then the limit is cut to what would just have met the target (waiting grows with what is in hand:
Little's law), and from there it rises by its square root until they wait too long again. A cut waits
for the answers that tell what the one before did. CPU that is nearly used up is no reason to cut, for
full processors with short queues are what one pays for; it makes the rise slow.

Levels, 0 the least, are what is shed first. The limit holds for all but the top tier, the lower a
level the smaller its share, and is never cut below the floor. The top tier enters up to the ceiling.
Only when it has more than the floor in hand by itself, the others are down to the floor or have nothing
in hand, and its own lists still wait too long for an engine, is it limited too; then nobody else is let
in while anything is in hand, and the top tier is the first to be let in again.

What a busy event loop adds to a list's way to the engine and back is no waiting for an engine, and
ranking less would not shorten it: it is taken off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

# Between the two the limit stays: a target just met is no reason to move.
_RISE_BELOW: Final = 0.7
_CUT_MOST: Final = 0.5
# The shares of the least and the highest level that the limit holds for.
_LEAST_SHARE: Final = 0.5
# Lag must last for so many samples: a collection of garbage is no overload.
_LAG_SAMPLES: Final = 3
# To be dispatched, to come back from the engine's thread, to be taken up by the task that waits.
_LOOP_TURNS: Final = 3


@dataclass(frozen=True, slots=True)
class ConcurrencyLimits:
    """`ceiling` lists in hand at most, whatever happens; `floor` at least, however long they wait.

    `queue_target_ms`, `lag_target_ms`: what may be waited; `cpu_high`: the share of the processors from
    which on the limit rises slowly.
    """

    floor: int
    ceiling: int
    queue_target_ms: float
    lag_target_ms: float
    cpu_high: float


class AdaptiveLimit:
    """For `levels` levels, of which the last `top` are the top tier's. Times are seconds of any one
    clock."""

    def __init__(self, limits: ConcurrencyLimits, levels: int, top: int) -> None:
        self._limits = limits
        self._ceiling = float(limits.ceiling)
        self._floor = float(min(limits.floor, limits.ceiling))
        lower = levels - top
        self._shares = np.concatenate(
            [np.linspace(_LEAST_SHARE, 1.0, lower), np.linspace(1.0 - 0.1 * (top - 1), 1.0, top)]
        )
        self._is_top = np.arange(levels) >= lower
        self._limit = self._top = self._ceiling
        self._caps = self._new_caps()
        self._peak = 0
        # Of the lower tiers, of the top one.
        self._own = [0, 0]
        self._own_peaks = [0, 0]
        self._waited_s = [0.0, 0.0]
        self._waited = [0, 0]
        self._lags_s = [0.0] * _LAG_SAMPLES
        self._rest_until_s = -math.inf
        self.in_flight = 0

    @property
    def limit(self) -> float:
        """Of lists in hand, below the top tier."""
        return self._limit

    @property
    def top_limit(self) -> float:
        return self._top

    @property
    def is_limiting(self) -> bool:
        return self._limit < self._ceiling or self._top < self._ceiling

    @property
    def caps(self) -> Float64:
        """Up to how many lists in hand each level is let in, [levels], rising."""
        return self._caps

    def enter(self, lists: int, *, is_top: bool) -> None:
        """So many lists are in hand now, of the top tier or of those below."""
        self.in_flight += lists
        self._own[is_top] += lists
        self._peak = max(self._peak, self.in_flight)
        self._own_peaks[is_top] = max(self._own_peaks[is_top], self._own[is_top])

    def leave(self, lists: int, *, is_top: bool) -> None:
        """And no longer."""
        self.in_flight -= lists
        self._own[is_top] -= lists

    def waited(self, queue_s: float, lists: int, *, is_top: bool) -> None:
        """So long did lists wait for an engine that have now been answered."""
        self._waited_s[is_top] += queue_s * lists
        self._waited[is_top] += lists

    def update(
        self, now_s: float, *, oldest_lower_s: float, oldest_top_s: float, lag_s: float, cpu: float
    ) -> None:
        """Many times a second. `oldest_…_s`: how long the oldest list in hand has waited beyond what
        ranking takes; `cpu`: the share of the processors in use, 0 to 1."""
        limits = self._limits
        self._lags_s = [*self._lags_s[1:], lag_s]
        lasting_s = min(self._lags_s)
        crossing_s = _LOOP_TURNS * sum(self._lags_s) / _LAG_SAMPLES
        lower_s, top_s = (
            max(oldest_s, waited_s / max(1, lists)) - crossing_s
            for oldest_s, waited_s, lists in zip(
                (oldest_lower_s, oldest_top_s), self._waited_s, self._waited, strict=True
            )
        )
        queue_s = max(lower_s, top_s)
        # How much longer than the targets is waited; at 1 a target is just met.
        queue, lag = queue_s * 1000 / limits.queue_target_ms, lasting_s * 1000 / limits.lag_target_ms
        pressure = max(queue, lag)
        if pressure > 1.0:
            if now_s >= self._rest_until_s:
                self._cut(max(_CUT_MOST, 1.0 / pressure), top_waits=top_s * 1000 > limits.queue_target_ms)
                self._rest_until_s = now_s + max(queue_s, lasting_s)
        elif pressure < _RISE_BELOW and self.is_limiting:
            busy = min(1.0, max(0.0, (cpu - limits.cpu_high) / (1.0 - limits.cpu_high)))
            self._rise(1.0 - 0.9 * busy)
        self._caps = self._new_caps()
        self._waited_s, self._waited = [0.0, 0.0], [0, 0]
        self._peak, self._own_peaks = self.in_flight, list(self._own)

    def _cut(self, factor: float, *, top_waits: bool) -> None:
        lower_peak, top_peak = self._own_peaks
        if self._limit > self._floor and lower_peak:
            self._limit = max(self._floor, min(self._limit, self._peak) * factor)
        elif top_waits and top_peak > self._floor:
            self._limit = 1.0
            self._top = max(self._floor, min(self._top, self._peak) * factor)

    def _rise(self, speed: float) -> None:
        if self._top < self._ceiling:
            risen = self._top + speed * math.sqrt(self._top)
            # A limit that nobody comes near keeps only the tiers below waiting.
            self._top = self._ceiling if risen > 2 * self._peak else min(self._ceiling, risen)
        else:
            self._limit = min(self._ceiling, self._limit + speed * math.sqrt(self._limit))

    def _new_caps(self) -> Float64:
        if not self.is_limiting:
            return np.full(len(self._shares), self._ceiling)
        caps = np.where(self._is_top, self._top, self._limit) * self._shares
        return np.maximum.accumulate(caps)
