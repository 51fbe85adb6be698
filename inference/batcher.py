"""First item waits, the rest fill until size or time; an answer for every question.

A batcher owns a bounded queue, a few threads and as many runners. Nothing ticks while it is empty.
Every failure is a value in the answers, so one item's trouble is never another's:

>>> answers = await batcher.submit([request, request])
>>> [type(answer).__name__ for answer in answers]
['RankedList', 'Overloaded']
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final, Generic, Protocol, TypeVar

from inference import metrics
from inference.errors import DeadlineExceeded, EngineFailed, InferenceError, ModelUnavailable, Overloaded
from inference.metrics import BatcherCounts
from inference.types import Priority

logger = logging.getLogger(__name__)

# Deadlines are looked at this often at most: an answer may be late by as much.
_ALARM_STEP_S: Final = 0.002
# How often one failed batch may be run again in parts. Finding one bad item among 64 takes 12.
_MAX_RETRIES: Final = 16
_RANK: Final[dict[Priority, int]] = {"high": 0, "normal": 1, "low": 2}


class Work(Protocol):
    """What the batcher reads from an item. `deadline_s` is on the event loop's clock."""

    @property
    def priority(self) -> Priority: ...
    @property
    def deadline_s(self) -> float | None: ...


T = TypeVar("T", bound=Work)
R = TypeVar("R")
Run = Callable[[list[T]], Sequence[R | InferenceError]]


@dataclass(frozen=True, slots=True)
class BatcherLimits:
    """`wait_ms` 0 dispatches as soon as a runner is idle, with everything that has arrived by then.

    While one runner works, another starts on a full batch at once, and on less only when that has
    waited `spread_ms`: items that come one by one gather behind the first runner and cost less
    together than they would side by side.
    """

    max_batch: int = 32
    max_queue: int = 2_048
    wait_ms: float = 0.0
    spread_ms: float = 25.0


class _Group(Generic[T, R]):
    """The items of one `submit`, answered together once each has its answer."""

    __slots__ = ("answers", "done", "entered_s", "items", "missing")

    def __init__(self, items: Sequence[T], done: asyncio.Future[None], entered_s: float) -> None:
        self.items = items
        self.answers: list[R | InferenceError | None] = [None] * len(items)
        self.missing = len(items)
        self.done = done
        self.entered_s = entered_s

    def wants(self, position: int) -> bool:
        return self.answers[position] is None and not self.done.done()

    def answer(self, position: int, answer: R | InferenceError) -> bool:
        """Keep the first answer given; False when there was one, or nobody waits any more."""
        if self.answers[position] is not None or self.done.done():
            return False
        self.answers[position] = answer
        self.missing -= 1
        if not self.missing:
            self.done.set_result(None)
        return True


_Entry = tuple[_Group[T, R], int]


class Batcher(Generic[T, R]):
    """Groups in, batches to runners, answers out. Used from one event loop.

    Each runner is called by one thread at a time, with at most `max_batch` items, and must return as
    many answers. One that raises is called again with parts of the batch, so that an item that
    poisons it fails alone.
    """

    def __init__(
        self,
        runners: Sequence[Run[T, R]],
        limits: BatcherLimits | None = None,
        *,
        executor: Executor | None = None,
    ) -> None:
        self.limits = limits or BatcherLimits()
        self.counts = BatcherCounts()
        self._idle = list(runners)
        self._executor = executor or ThreadPoolExecutor(len(self._idle), thread_name_prefix="batcher")
        self._queues: tuple[deque[_Entry[T, R]], ...] = (deque(), deque(), deque())
        self._queued = 0
        self._running: dict[int, list[_Entry[T, R]]] = {}
        self._wake: asyncio.Handle | None = None
        self._wake_at = 0.0
        self._alarm: asyncio.TimerHandle | None = None
        self._closing = False
        self._drained: asyncio.Future[None] | None = None

    @property
    def queued(self) -> int:
        return self._queued

    @property
    def running(self) -> int:
        return sum(map(len, self._running.values()))

    async def submit(self, items: Sequence[T]) -> list[R | InferenceError]:
        """One answer per item, in order. Failures are returned, not raised; cancelling frees the queue."""
        if not items:
            return []
        if self._closing:
            return [ModelUnavailable("the batcher is closing") for _ in items]
        loop = asyncio.get_running_loop()
        group: _Group[T, R] = _Group(items, loop.create_future(), loop.time())
        self.counts.items += len(items)
        self._enqueue(group)
        try:
            await group.done
        except asyncio.CancelledError:
            self._forget(group)
            raise
        return group.answers  # type: ignore[return-value]  # done means none is None

    async def drain(self, timeout_s: float = 10.0) -> bool:
        """Refuse new items, finish those accepted; True when all were answered in time.

        What is left at the timeout is answered `ModelUnavailable`.
        """
        self._closing = True
        if self._queued or self._running:
            self._dispatch()
        if self._queued or self._running:
            self._drained = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._drained], timeout=timeout_s)
        left = self._queued + self.running
        for entries in (*self._queues, *self._running.values()):
            for group, position in entries:
                group.answer(position, ModelUnavailable("the batcher closed before an engine answered"))
        for queue in self._queues:
            queue.clear()
        self._set_queued(0)
        if self._alarm is not None:
            self._alarm.cancel()
        self._executor.shutdown(wait=not self._running, cancel_futures=True)
        return not left

    def _enqueue(self, group: _Group[T, R]) -> None:
        items = group.items
        positions: Sequence[int] = range(len(items))
        room = self.limits.max_queue - self._queued
        if len(items) > room:
            room = max(0, room)
            positions = sorted(positions, key=lambda position: _RANK[items[position].priority])
            for position in positions[room:]:
                group.answer(position, Overloaded(f"{self.limits.max_queue} items are queued already"))
            self.counts.refused += len(items) - room
            metrics.REFUSED.inc(len(items) - room)
            positions = positions[:room]
        if not positions:
            return
        earliest: float | None = None
        for position in positions:
            item = items[position]
            self._queues[_RANK[item.priority]].append((group, position))
            if item.deadline_s is not None and (earliest is None or item.deadline_s < earliest):
                earliest = item.deadline_s
        self._set_queued(self._queued + len(positions))
        if earliest is not None:
            self._set_alarm(earliest)
        if self._idle:
            # Not now: what is submitted in the same turn of the loop joins the batch.
            self._wake_soon(group.entered_s)

    def _wake_soon(self, when_s: float) -> None:
        """Dispatch on the loop's next turn, or at a later time; the earlier of two wishes wins."""
        loop = asyncio.get_running_loop()
        if self._wake is not None:
            if self._wake_at <= when_s:
                return
            self._wake.cancel()
        self._wake_at = when_s
        later = when_s > loop.time()
        self._wake = loop.call_at(when_s, self._dispatch) if later else loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        while self._idle and self._queued:
            ripe_s = self._ripe_s()
            now_s = asyncio.get_running_loop().time()
            if ripe_s > now_s:
                self._wake_soon(ripe_s)
                break
            batch = self._take(now_s)
            if batch:
                self._start(batch)
        self._check_drained()

    def _ripe_s(self) -> float:
        """When the next batch should leave: now if it is full, urgent or nothing is gained by waiting."""
        urgent, *patient = self._queues
        wait_ms = max(self.limits.wait_ms, self.limits.spread_ms if self._running else 0.0)
        if urgent or self._closing or not wait_ms or self._queued >= self.limits.max_batch:
            return 0.0
        return min(queue[0][0].entered_s for queue in patient if queue) + wait_ms / 1e3

    def _take(self, now_s: float) -> list[_Entry[T, R]]:
        batch: list[_Entry[T, R]] = []
        taken, max_batch = 0, self.limits.max_batch
        for queue in self._queues:
            while queue and len(batch) < max_batch:
                entry = queue.popleft()
                taken += 1
                group, position = entry
                deadline_s = group.items[position].deadline_s
                if deadline_s is not None and deadline_s <= now_s:
                    self._expire(entry)
                elif group.answers[position] is None and not group.done.done():
                    batch.append(entry)
        self._set_queued(self._queued - taken)
        return batch

    def _start(self, batch: list[_Entry[T, R]]) -> None:
        loop = asyncio.get_running_loop()
        runner = self._idle.pop()
        items = [group.items[position] for group, position in batch]
        self._running[id(batch)] = batch
        self.counts.batches += 1
        self.counts.largest_batch = max(self.counts.largest_batch, len(batch))
        started_s = loop.time()
        metrics.BATCH_ITEMS.observe(len(batch))
        metrics.WAIT_SECONDS.observe(started_s - batch[0][0].entered_s)
        future = loop.run_in_executor(self._executor, partial(_answers, runner, items))
        future.add_done_callback(partial(self._finish, runner, batch, started_s))

    def _finish(
        self,
        runner: Run[T, R],
        batch: list[_Entry[T, R]],
        started_s: float,
        future: asyncio.Future[tuple[list[R | InferenceError], int]],
    ) -> None:
        metrics.RUN_SECONDS.observe(future.get_loop().time() - started_s)
        error = None if future.cancelled() else future.exception()
        if future.cancelled() or error is not None:
            answers: list[R | InferenceError] = [EngineFailed(f"the runner died: {error!r}") for _ in batch]
        else:
            answers, retries = future.result()
            self.counts.retried_batches += retries
        failed = late = 0
        for (group, position), answer in zip(batch, answers, strict=True):
            if not group.answer(position, answer):
                late += 1
            elif isinstance(answer, InferenceError):
                failed += 1
        self.counts.answered += len(batch) - failed - late
        if failed:
            self.counts.failed += failed
            metrics.FAILED.inc(failed)
        del self._running[id(batch)]
        self._idle.append(runner)
        self._dispatch()

    def _expire(self, entry: _Entry[T, R]) -> None:
        group, position = entry
        if group.answer(position, DeadlineExceeded("the deadline passed before an engine answered")):
            self.counts.expired += 1
            metrics.EXPIRED.inc()

    def _set_alarm(self, when_s: float) -> None:
        if self._alarm is not None:
            if self._alarm.when() <= when_s:
                return
            self._alarm.cancel()
        self._alarm = asyncio.get_running_loop().call_at(when_s, self._ring)

    def _ring(self) -> None:
        """Answer everything whose deadline has passed, queued or running: a hung engine delays nobody."""
        self._alarm = None
        now_s = asyncio.get_running_loop().time()
        next_s: float | None = None
        for entries in (*self._queues, *self._running.values()):
            for entry in entries:
                group, position = entry
                deadline_s = group.items[position].deadline_s
                if deadline_s is None or not group.wants(position):
                    continue
                if deadline_s <= now_s:
                    self._expire(entry)
                elif next_s is None or deadline_s < next_s:
                    next_s = deadline_s
        self._sweep()
        if next_s is not None:
            self._set_alarm(max(next_s, now_s + _ALARM_STEP_S))

    def _forget(self, group: _Group[T, R]) -> None:
        self.counts.cancelled += group.missing
        self._sweep()

    def _sweep(self) -> None:
        """Give back the room of queued items that no longer want an answer."""
        for queue in self._queues:
            kept = [entry for entry in queue if entry[0].wants(entry[1])]
            if len(kept) < len(queue):
                queue.clear()
                queue.extend(kept)
        self._set_queued(sum(map(len, self._queues)))
        self._check_drained()

    def _check_drained(self) -> None:
        if self._drained is not None and not self._drained.done() and not (self._queued or self._running):
            self._drained.set_result(None)

    def _set_queued(self, items: int) -> None:
        self._queued = items
        metrics.QUEUE_ITEMS.set(items)


def _answers(runner: Run[T, R], items: list[T]) -> tuple[list[R | InferenceError], int]:
    """Run a batch, in parts where the whole fails; in the executor's thread. Also says how often again."""
    retries = 0

    def attempt(part: list[T]) -> list[R | InferenceError]:
        nonlocal retries
        try:
            answers = list(runner(part))
        except (ModelUnavailable, DeadlineExceeded, Overloaded) as error:
            return [error for _ in part]
        except Exception as error:
            logger.exception("a batch of %d failed", len(part))
            if len(part) > 1 and retries + 2 <= _MAX_RETRIES:
                retries += 2
                half = len(part) // 2
                return attempt(part[:half]) + attempt(part[half:])
            return [EngineFailed(f"{type(error).__name__}: {error}") for _ in part]
        if len(answers) != len(part):
            return [EngineFailed(f"asked {len(part)} questions, got {len(answers)} answers") for _ in part]
        return answers

    return attempt(items), retries
