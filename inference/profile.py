"""How long a lane takes for a batch, learned while it works."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# A batch counts this much towards how fast the lane is now, and the root of it towards what its size costs.
_SCALE_SHARE: Final = 0.3
_SIZE_POWER: Final = 1 / 6
# One slow batch is a hiccup: it counts as no more than so many times what was expected.
_MOST_RATIO: Final = 3.0
# A batch that takes so many times what it costs is a slow one.
SLOWED: Final = 2.5
_FIRST_GUESS_S: Final = 1e-3
_LEAST_S: Final = 1e-7


class LatencyProfile:
    """Seconds per batch, by its number of items, as an exponentially weighted mean.

    What a size costs and how fast the lane is at the moment are kept apart: an engine that slows down
    slows down at every size, so one slow batch of 32 says something about the next single item. A cost moves
    by a root of what the scale moves by, so that they go together and come back together: with steps of their
    own the spread alone carries costs up and the scale down, without end.
    """

    def __init__(self, prior: Mapping[int, float] | None = None) -> None:
        """`prior`: seconds by batch size, from warming up or from the cost model."""
        self._cost_s = {_place(size): max(_LEAST_S, cost_s) for size, cost_s in (prior or {}).items()}
        self.scale = 1.0
        self.slow_s = 0.0
        """How long the last batches in a row took that were slow ones."""

    def predict(self, items: int) -> float:
        """Seconds that a batch of so many items is expected to take now."""
        return self.scale * self._cost(_place(items))

    def observe(self, items: int, took_s: float) -> None:
        place = _place(items)
        if place not in self._cost_s:
            self._cost_s[place] = max(_LEAST_S, took_s / self.scale)
            return
        cost_s = self._cost_s[place]
        self.slow_s = self.slow_s + took_s if took_s >= SLOWED * cost_s else 0.0
        expected_s = self.scale * cost_s
        ratio = min(max(took_s, _LEAST_S) / expected_s, _MOST_RATIO)
        step = 1.0 + _SCALE_SHARE * (ratio - 1.0)
        self.scale *= step
        self._cost_s[place] *= step**_SIZE_POWER

    def restart(self) -> None:
        """Forget how slow the lane was: it has a new engine. What was faster than it costs stays so, or a
        lane would be asked no more for being slower than it ever was."""
        self.scale, self.slow_s = min(self.scale, 1.0), 0.0

    def _cost(self, place: int) -> float:
        """Of a size, in full speed; between and beyond the known ones in proportion."""
        known = self._cost_s.get(place)
        if known is not None:
            return known
        if not self._cost_s:
            return _FIRST_GUESS_S
        below = max((size for size in self._cost_s if size < place), default=None)
        above = min((size for size in self._cost_s if size > place), default=None)
        if below is None:
            assert above is not None
            return self._cost_s[above]
        if above is None:
            return self._cost_s[below] * place / below
        part = (place - below) / (above - below)
        return self._cost_s[below] + part * (self._cost_s[above] - self._cost_s[below])


def _place(items: int) -> int:
    """The power of two that holds so many items."""
    return 1 << max(0, items - 1).bit_length()
