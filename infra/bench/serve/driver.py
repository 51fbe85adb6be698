"""A process that offers load: steps in on standard input, results out, one JSON object a line.

Where several offer it together each sends every so manieth request of the same schedule.

Open loop: a request leaves when it is due, whether or not answers come, and its latency counts from
then. Where the oldest answer is long overdue the rest of the step is not sent, which fails it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from infra.bench.serve.arrivals import bursty
from infra.bench.serve.search import GOAL_MS

Done = Callable[[bytes | None], None]

GIVE_UP_S: Final = 0.5
DRAIN_S: Final = 5.0
# uvloop's clock has milliseconds: what is due sooner would keep the loop spinning, on a processor that what
# is measured needs. Requests due within one leave together, and count from when each was due.
_TICK_S: Final = 1e-3


class Sender(Protocol):
    """Sends request `number`, of as many different ones as it has, over again after the last, and calls
    back with the answer or None."""

    def send(self, number: int, done: Done) -> None: ...

    async def ready(self) -> None:
        """Before a step: what ended while nothing was asked begins anew."""

    async def reset(self) -> None:
        """Give up what is still unanswered; the next step starts from nothing."""

    def close(self) -> None: ...


async def drive(sender: Sender, lists: int) -> None:
    """Run steps until standard input ends. `lists` is how many a request asks for."""
    loop = asyncio.get_running_loop()
    first = 0
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        told = json.loads(line)
        due_s = bursty(told["lists_per_s"] / lists, told["seconds"], told["seed"])
        due_s = due_s[told["part"] :: told["parts"]]
        await sender.ready()
        cpu_s = time.process_time()
        latency_s, behind_s = await Offer(sender, due_s, first).run()
        first += len(behind_s)  # sessions go on where they were
        cpu_s = time.process_time() - cpu_s
        answer = summary(latency_s, behind_s, told["seconds"], lists)
        answer["client_cpu_us"] = cpu_s * 1e6 / max(1, lists * int(np.isfinite(latency_s).sum()))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def summary(
    latency_s: npt.NDArray[np.float64], behind_s: npt.NDArray[np.float64], seconds: float, lists: int
) -> dict[str, Any]:
    """The figures of one step; infinity in `latency_s` is a request without an answer."""
    ordered = np.sort(latency_s)
    p50, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.99))
    return {
        "lists_per_s": len(latency_s) * lists / seconds,
        "goodput": int((latency_s <= GOAL_MS / 1e3).sum()) * lists / seconds,
        "requests": len(latency_s),
        "failed": int(np.isinf(latency_s).sum()),
        "p50_ms": 1e3 * p50,
        "p99_ms": 1e3 * p99,
        "behind_p99_ms": 1e3 * float(np.percentile(behind_s, 99)) if len(behind_s) else 0.0,
    }


class Offer:
    """One schedule being sent, beginning with request `first`."""

    def __init__(self, sender: Sender, due_s: npt.NDArray[np.float64], first: int = 0) -> None:
        self._sender = sender
        self._first = first
        self._loop = asyncio.get_running_loop()
        self._due_s = (due_s + self._loop.time() + 0.05).tolist()
        self._latency_s = np.full(len(due_s), np.inf)
        self._behind_s: list[float] = []
        self._answered = 0
        self._oldest = 0
        self._over = self._loop.create_future()
        self._quiet = asyncio.Event()

    async def run(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        self._send_due()
        await self._over
        if self._answered < len(self._behind_s):
            self._quiet.clear()
            try:
                await asyncio.wait_for(self._quiet.wait(), DRAIN_S)
            except TimeoutError:
                await self._sender.reset()
        return self._latency_s.copy(), np.array(self._behind_s)

    def _send_due(self) -> None:
        now_s, sent = self._loop.time(), len(self._behind_s)
        while sent < len(self._due_s) and self._due_s[sent] <= now_s:
            self._behind_s.append(now_s - self._due_s[sent])
            self._sender.send(self._first + sent, self._taker(sent))
            sent += 1
        if sent == len(self._due_s) or self._overdue(now_s, sent):
            self._over.set_result(None)
        else:
            self._loop.call_later(max(_TICK_S, self._due_s[sent] - now_s), self._send_due)

    def _overdue(self, now_s: float, sent: int) -> bool:
        while self._oldest < sent and np.isfinite(self._latency_s[self._oldest]):
            self._oldest += 1
        return self._oldest < sent and now_s - self._due_s[self._oldest] > GIVE_UP_S

    def _taker(self, number: int) -> Done:
        def take(answer: bytes | None) -> None:
            self._answered += 1
            if self._answered == len(self._behind_s):
                self._quiet.set()
            if answer is not None:
                self._latency_s[number] = self._loop.time() - self._due_s[number]

        return take
