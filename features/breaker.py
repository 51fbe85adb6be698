"""A circuit breaker: what keeps failing is left alone for a while."""

from __future__ import annotations

import time
from collections.abc import Callable


class Breaker:
    """Opens after `failures` in a row; from then on one probe every `open_s` goes through.

    A probe that succeeds closes it. A probe that is never reported (its task was cancelled) costs
    another `open_s` and nothing else. Not for several threads.
    """

    def __init__(
        self, failures: int = 3, open_s: float = 1.0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = failures
        self._open_s = open_s
        self._clock = clock
        self._streak = 0
        self._probe_at_s = 0.0

    @property
    def is_open(self) -> bool:
        return self._streak >= self._limit

    def allow(self) -> bool:
        """Whether the next call may be made; True while open makes that call the probe."""
        if not self.is_open:
            return True
        now_s = self._clock()
        if now_s < self._probe_at_s:
            return False
        self._probe_at_s = now_s + self._open_s
        return True

    def succeeded(self) -> None:
        self._streak = 0

    def failed(self) -> None:
        self._streak += 1
        self._probe_at_s = self._clock() + self._open_s
