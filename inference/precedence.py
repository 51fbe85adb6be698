"""Who goes first while more waits than can be ranked: the highest level keeps a lane free."""

from __future__ import annotations

from typing import Final

# The highest level is the highest that came within this time.
_SEEN_FOR_S: Final = 1.0


class Precedence:
    """Which level is first. Times are seconds of any one clock."""

    def __init__(self) -> None:
        self._seen_s: dict[int, float] = {}  # by level, when something last came

    def came(self, level: int, now_s: float) -> None:
        self._seen_s[level] = now_s

    def top(self, now_s: float, otherwise: int) -> int:
        """The highest level that something came of lately."""
        recent = (level for level, seen_s in self._seen_s.items() if now_s - seen_s < _SEEN_FOR_S)
        return min(recent, default=otherwise)
