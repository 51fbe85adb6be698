"""A version that ranks a share of the live requests for comparison: nobody sees or waits for its lists."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Final

from inference.errors import InferenceError
from inference.releases.comparison import Comparison, Sample
from inference.releases.metrics import ReleaseMetrics
from inference.types import RankedList, RankRequest

log = logging.getLogger(__name__)

BATCH: Final = 4
WAITING: Final = 64
DEADLINE_S: Final = 2.0
FAILURES: Final = 3
# How often a busy machine is asked again, and how long a sample may wait for it.
BUSY_STEP_S: Final = 0.005

Rank = Callable[[Sequence[RankRequest]], Awaitable[list[RankedList | InferenceError]]]


class Shadow:
    """Takes samples after their lists have been answered, ranks them at low priority while `busy` says
    no, and drops them when it does not come to it."""

    def __init__(
        self,
        rank: Rank,
        share: float,
        busy: Callable[[], bool],
        metrics: ReleaseMetrics,
        *,
        seed: int | None = None,
    ) -> None:
        self.comparison = Comparison()
        self._rank = rank
        self.share = share
        self._busy = busy
        self._metrics = metrics
        self._random = random.Random(seed)
        self._waiting: deque[Sample] = deque()
        self._failing = 0
        self._working: asyncio.Task[None] | None = None

    def offer(self, requests: Sequence[RankRequest], answers: Sequence[RankedList | InferenceError]) -> None:
        """Sample live requests with what was answered. Costs the live path a few microseconds; nothing
        any more once the version has failed at `FAILURES` batches in a row."""
        if self._failing >= FAILURES:
            return
        for request, answer in zip(requests, answers, strict=True):
            if self._random.random() >= self.share or not isinstance(answer, RankedList):
                continue
            if len(self._waiting) >= WAITING:
                self._drop(1)
            else:
                self._waiting.append(Sample(request, answer))
        if self._waiting and (self._working is None or self._working.done()):
            self._working = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Rank nothing more; returns when nothing is being ranked."""
        self._waiting.clear()
        if self._working is not None:
            await asyncio.wait([self._working])

    async def _work(self) -> None:
        while self._waiting:
            until_s = time.monotonic() + DEADLINE_S
            while self._busy():
                if time.monotonic() > until_s:
                    self._drop(len(self._waiting))
                    self._waiting.clear()
                    return
                await asyncio.sleep(BUSY_STEP_S)
            samples = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            if samples:
                await self._compare(samples)

    async def _compare(self, samples: list[Sample]) -> None:
        before = (self.comparison.compared, self.comparison.failed, self.comparison.busy)
        deadline_s = asyncio.get_running_loop().time() + DEADLINE_S
        asked = unhurried((sample.request for sample in samples), deadline_s)
        started_s = time.perf_counter()
        try:
            answers = await self._rank(asked)
        except Exception:
            log.exception("The shadow failed at a batch of %d", len(samples))
            self.comparison.failed += len(samples)
        else:
            took_s = time.perf_counter() - started_s
            self.comparison.add(samples, answers, took_s)
            self._metrics.shadow_s.observe(took_s)
        self._failing = self._failing + 1 if self.comparison.failed - before[1] == len(samples) else 0
        if self._failing == FAILURES:
            log.warning("The shadow fails at all it is asked and gets no more: %s", self.comparison.reason)
        after = (self.comparison.compared, self.comparison.failed, self.comparison.busy)
        for outcome, one, other in zip(("compared", "failed", "dropped"), before, after, strict=True):
            self._metrics.shadow.labels(outcome=outcome).inc(other - one)
        if self.comparison.compared:
            self._metrics.shadow_overlap.set(self.comparison.overlap)

    def _drop(self, count: int) -> None:
        self.comparison.busy += count
        self._metrics.shadow.labels(outcome="dropped").inc(count)


def unhurried(requests: Iterable[RankRequest], deadline_s: float | None) -> list[RankRequest]:
    """The same requests behind everything that somebody waits for."""
    return [replace(request, priority="low", tier=0, deadline_s=deadline_s) for request in requests]
