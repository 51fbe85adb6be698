"""Who goes first while more waits than can be ranked: the highest level keeps a lane free."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Final

# The highest level is the highest that came within this time.
_SEEN_FOR_S: Final = 1.0
# A queue that was too long is taken to be so for this time: were the lane given away whenever it is short
# for a moment, the highest level would find both lanes at work for others just then.
_CROWDED_FOR_S: Final = 0.25
# What has no lane of its own lets the highest level be ranked first for so long: about what a batch of that
# takes.
_YIELD_S: Final = 0.005


class Precedence:
    """Which level is first, and whether that counts. Times are seconds of any one clock."""

    def __init__(self) -> None:
        self._seen_s: dict[int, float] = {}  # by level, when something last came
        self._crowded_s = -math.inf
        self._yields_until_s: float | None = None

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

    def below_at_s(self, running: Collection[int], top: int, able: int, now_s: float) -> float | None:
        """When what is below the highest level may start, beside batches of the levels `running`: a time
        that has come, or one to ask again at; None until one of them has ended, for of `able` lanes one is
        kept. For a moment it waits for the highest level to be ranked, too: side by side they would take the
        interpreter's lock from each other."""
        below = [level > top for level in running]
        if sum(below) >= able - 1:
            return None
        if all(below):
            self._yields_until_s = None
            return now_s
        if self._yields_until_s is None:
            self._yields_until_s = now_s + _YIELD_S
        until_s = self._yields_until_s
        if until_s <= now_s:
            self._yields_until_s = None
        return until_s

    def _recent(self, now_s: float) -> list[int]:
        return [level for level, seen_s in self._seen_s.items() if now_s - seen_s < _SEEN_FOR_S]
