"""Who goes first while more waits than can be ranked: the highest level that came of late."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# The highest level is the highest that came within this time.
_SEEN_FOR_S: Final = 1.0
# A gap counts this much towards what the next one is expected to be.
_GAP_SHARE: Final = 0.1
# The next is due after so many times the usual gap: most come before.
_DUE_AFTER: Final = 1.25


@dataclass(slots=True)
class _Coming:
    """When something of a level last came, and how far apart that is."""

    seen_s: float
    gap_s: float = 0.0


class Precedence:
    """Which level is first, and when more of it is due: what is polled comes in turns. Times are seconds of
    any one clock."""

    def __init__(self) -> None:
        self._coming: dict[int, _Coming] = {}

    def came(self, level: int, now_s: float) -> None:
        coming = self._coming.get(level)
        if coming is None:
            self._coming[level] = _Coming(now_s)
        elif now_s > coming.seen_s:
            coming.gap_s += _GAP_SHARE * (now_s - coming.seen_s - coming.gap_s)
            coming.seen_s = now_s

    def top(self, now_s: float, otherwise: int) -> int:
        """The highest level that something came of lately."""
        recent = (level for level, one in self._coming.items() if now_s - one.seen_s < _SEEN_FOR_S)
        return min(recent, default=otherwise)

    def next_s(self, level: int) -> float:
        """When more of a level is due; always past where nothing of it came."""
        coming = self._coming.get(level)
        return 0.0 if coming is None else coming.seen_s + _DUE_AFTER * coming.gap_s
