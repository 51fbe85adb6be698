"""What a connection is ended for when it does nothing, counted in sweeps: no clock is read for a call."""

from __future__ import annotations

from typing import Literal

from inference.http2.limits import Limits

Verdict = Literal["fine", "silent", "idle", "dead"]


class Watch:
    """Of one connection."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # Sweeps since the connection was made, asked something, said anything, read anything.
        self._age = 0
        self._idle = 0
        self._silent = 0
        self._stuck = 0
        self._unwritten = 0
        self._pinged = False

    def heard(self) -> None:
        """Bytes came."""
        self._silent = 0
        self._pinged = False

    def asked(self) -> None:
        """A call ended."""
        self._idle = 0

    def look(self, *, settled: bool, busy: bool, unwritten: int) -> Verdict:
        """Once a sweep. `settled`: the handshake is over; `busy`: there are calls; `unwritten`: bytes the
        socket has not taken. `silent` asks for a ping, once in a silence."""
        limits, sweep_s = self._limits, self._limits.sweep_s
        self._age += 1
        self._silent += 1
        if unwritten < self._unwritten:
            self.heard()  # it reads
        self._stuck = self._stuck + 1 if unwritten and unwritten >= self._unwritten else 0
        self._unwritten = unwritten
        self._idle = 0 if busy else self._idle + 1
        if not settled and self._age * sweep_s > limits.handshake_s:
            return "dead"
        if self._stuck * sweep_s > limits.stall_s:
            return "dead"
        if self._silent * sweep_s > limits.keepalive_s + limits.keepalive_timeout_s:
            return "dead"
        if self._idle * sweep_s > limits.idle_s:
            return "idle"
        if self._silent * sweep_s > limits.keepalive_s and not self._pinged:
            self._pinged = True
            return "silent"
        return "fine"
