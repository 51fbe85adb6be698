"""One timer for all deadlines: set to the earliest, looked at a few hundred times a second at most."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

# Deadlines are looked at this often at most: an answer may be late by as much.
_STEP_S: Final = 0.002


class Alarm:
    """Calls `ring` with the time when the earliest deadline has passed; what that returns is the next one,
    if there is any. Used from one event loop."""

    def __init__(self, ring: Callable[[float], float | None]) -> None:
        self._ring = ring
        self._timer: asyncio.TimerHandle | None = None
        self._at_s = 0.0

    def set(self, when_s: float) -> None:
        """Ring then, unless it is to ring before."""
        if self._timer is not None:
            if self._at_s <= when_s:
                return
            self._timer.cancel()
        # Kept beside the handle: uvloop's has no time where that has passed.
        self._at_s = when_s
        self._timer = asyncio.get_running_loop().call_at(when_s, self._passed)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _passed(self) -> None:
        self._timer = None
        now_s = asyncio.get_running_loop().time()
        next_s = self._ring(now_s)
        if next_s is not None:
            self.set(max(next_s, now_s + _STEP_S))
