"""How often a client may ping, and give up calls, before it is sent away."""

from __future__ import annotations

from inference.http2.limits import IDLE_PING_INTERVAL_S, MAX_PING_STRIKES, RESETS_AT_ONCE, RESETS_PER_S


class Pings:
    """gRPC's rule: a ping that comes too soon after the one before is a strike, an answer clears them."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._last_s: float | None = None
        self._answers = 0
        self._strikes = 0

    def allowed(self, now_s: float, busy: bool, answers: int) -> bool:
        """Of a ping that came. `busy`: there are calls; `answers`: frames of answers sent so far."""
        if answers != self._answers:
            self._answers = answers
            self._strikes = 0
            self._last_s = None
        interval_s = self._interval_s if busy else max(self._interval_s, IDLE_PING_INTERVAL_S)
        if self._last_s is not None and now_s < self._last_s + interval_s:
            self._strikes += 1
        self._last_s = now_s
        return self._strikes <= MAX_PING_STRIKES


class Resets:
    """A token bucket."""

    def __init__(self, now_s: float) -> None:
        self._left = float(RESETS_AT_ONCE)
        self._at_s = now_s

    def allowed(self, now_s: float) -> bool:
        """Of a call that was given up."""
        self._left = min(float(RESETS_AT_ONCE), self._left + RESETS_PER_S * (now_s - self._at_s))
        self._at_s = now_s
        self._left -= 1.0
        return self._left >= 0.0
