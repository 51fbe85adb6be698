"""Who goes first while more waits than can be ranked: the highest level keeps a lane free."""

from __future__ import annotations

import math
from typing import Final

# The highest level is the highest that came within this time.
_SEEN_FOR_S: Final = 1.0
# A queue that was too long is taken to be so for this time: were the lane given away whenever it is short
# for a moment, the highest level would find both lanes at work for others just then.
_CROWDED_FOR_S: Final = 0.25


class Precedence:
    """Which level is first, and whether that counts. Times are seconds of any one clock."""

    def __init__(self) -> None:
        self._seen_s: dict[int, float] = {}  # by level, when something last came
        self._crowded_s = -math.inf

    def came(self, level: int, now_s: float) -> None:
        self._seen_s[level] = now_s

    def crowded(self, now_s: float) -> None:
        """More waits than one batch can hold."""
        self._crowded_s = now_s

    def counts(self, now_s: float) -> bool:
        """Whether more waits than can be ranked, or did lately."""
        return now_s - self._crowded_s < _CROWDED_FOR_S

    def top(self, now_s: float, otherwise: int) -> int:
        """The highest level that something came of lately."""
        return min(self._recent(now_s), default=otherwise)

    def precedes(self, level: int, now_s: float) -> bool:
        """Whether it is the highest, and others came of late, too."""
        recent = self._recent(now_s)
        return len(recent) > 1 and level <= min(recent)

    def _recent(self, now_s: float) -> list[int]:
        return [level for level, seen_s in self._seen_s.items() if now_s - seen_s < _SEEN_FOR_S]
