"""First item waits, the rest fill until size or time; an answer for every question.

A batcher owns a bounded queue and the lanes of a dispatcher. Nothing ticks while it is empty. Every
failure is a value in the answers, so one item's trouble is never another's:

>>> answers = await batcher.submit([request, request], key=version)
>>> [type(answer).__name__ for answer in answers]
['RankedList', 'Overloaded']

A batch holds items of one key only. What a lane fails at goes to another lane; a lane that hangs,
keeps failing or answers with failures is taken out until a probe says that it is well.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Generic, Protocol, TypeVar

from inference import metrics
from inference.dispatcher import SLOW, Dispatcher, Lane, leave_room
from inference.errors import DeadlineExceeded, EngineFailed, InferenceError, ModelUnavailable, Overloaded
from inference.metrics import BatcherCounts
from inference.types import Priority
from inference.waiting import Gather, Queue, Waiting

logger = logging.getLogger(__name__)

# Deadlines are looked at this often at most: an answer may be late by as much.
_ALARM_STEP_S: Final = 0.002
# A batch held back for a busy lane is looked at again after so long, should that lane be late.
_HOLD_STEP_S: Final = 0.001
# How often one failed batch may be run again in parts. Finding one bad item among 64 takes 12.
_MAX_RETRIES: Final = 16
# A lane that has become slow, and is not asked for it, is probed this often.
_PROBE_EVERY_S: Final = 1.0
_TIERS: Final = 16
_LAST: Final = 3 * _TIERS
# While more waits than can be ranked, a lane is left to the highest level that came within this time.
_RESERVED_FOR_S: Final = 1.0
_RANK: Final[dict[Priority, int]] = {"high": 0, "normal": _TIERS, "low": 2 * _TIERS}


class Work(Protocol):
    """What the batcher reads from an item. `deadline_s` is on the event loop's clock; within a priority
    the higher `tier` goes first."""

    @property
    def priority(self) -> Priority: ...
    @property
    def tier(self) -> int: ...
    @property
    def deadline_s(self) -> float | None: ...


T = TypeVar("T", bound=Work)
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class BatcherLimits:
    """`wait_ms` 0 dispatches as soon as a lane is idle, with everything that has arrived by then.

    While one lane works, another starts on a full batch at once, and on less only when that has
    waited `spread_ms`: items that come one by one gather behind the first lane and cost less
    together than they would side by side. A lane that has not answered a batch after `hang_ms`, and
    ten times what was predicted, hangs.
    """

    max_batch: int = 32
    max_queue: int = 2_048
    wait_ms: float = 0.0
    spread_ms: float = 25.0
    hang_ms: float = 1_000.0


class _Group(Generic[T, R]):
    """The items of one `submit`, answered together once each has its answer."""

    __slots__ = ("answers", "done", "entered_s", "items", "key", "missing")

    def __init__(
        self, items: Sequence[T], key: Hashable, done: asyncio.Future[None], entered_s: float
    ) -> None:
        self.items = items
        self.key = key
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


@dataclass(slots=True, eq=False)
class _Batch(Generic[T, R]):
    """Entries that go through a lane together, and the lanes that have failed at them."""

    key: Hashable
    entries: list[_Entry[T, R]]
    tried: tuple[Lane, ...] = ()
    level: int = 0
    aside: bool = False
    started_s: float = 0.0
    watch: asyncio.TimerHandle | None = None


class Batcher(Generic[T, R]):
    """Groups in, batches to lanes, answers out. Used from one event loop.

    `replace` is called with a lane that was taken out: it may give the lane a new engine, in a thread
    of its own, before the lane is probed.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        limits: BatcherLimits | None = None,
        *,
        replace: Callable[[Lane], None] | None = None,
        waiting: Waiting | None = None,
    ) -> None:
        self.limits = limits or BatcherLimits()
        self.waiting = waiting or Gather(self.limits.wait_ms / 1e3, self.limits.spread_ms / 1e3)
        self.counts = BatcherCounts()
        self.dispatcher = Dispatcher(lanes)
        self._replace = replace
        self._queues: dict[int, deque[_Entry[T, R]]] = {}  # by level, the first to go first
        self._seen_s: dict[int, float] = {}  # by level, when something last came
        self._top = 0
        self._queued = 0
        self._again: deque[_Batch[T, R]] = deque()
        self._running: dict[int, _Batch[T, R]] = {}
        self._wake: asyncio.Handle | None = None
        self._wake_at = 0.0
        self._alarm: asyncio.Handle | None = None
        self._alarm_at = 0.0
        self._probes: set[asyncio.Future[None]] = set()
        self._pauses: set[asyncio.TimerHandle] = set()
        self._closing = False
        self._drained: asyncio.Future[None] | None = None

    @property
    def queued(self) -> int:
        return self._queued

    @property
    def running(self) -> int:
        return sum(len(batch.entries) for batch in (*self._running.values(), *self._again))

    async def submit(self, items: Sequence[T], key: Hashable = None) -> list[R | InferenceError]:
        """One answer per item, in order. Failures are returned, not raised; cancelling frees the queue."""
        if not items:
            return []
        if self._closing:
            return [ModelUnavailable("the batcher is closing") for _ in items]
        loop = asyncio.get_running_loop()
        group: _Group[T, R] = _Group(items, key, loop.create_future(), loop.time())
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
        if self._busy():
            self._dispatch()
        if self._busy():
            self._drained = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._drained], timeout=timeout_s)
        left = self._queued + self.running
        batches = (*self._running.values(), *self._again)
        for entries in (*self._queues.values(), *(batch.entries for batch in batches)):
            for group, position in entries:
                group.answer(position, ModelUnavailable("the batcher closed before an engine answered"))
        for queue in self._queues.values():
            queue.clear()
        self._again.clear()
        self._set_queued(0)
        for handle in (self._alarm, *self._pauses, *(batch.watch for batch in batches)):
            if handle is not None:
                handle.cancel()
        for lane in self.dispatcher.lanes:
            for executor in lane.executors:
                executor.shutdown(wait=not lane.busy and not self._probes, cancel_futures=True)
        return not left

    # Entering ----------------------------------------------------------------------------------

    def _enqueue(self, group: _Group[T, R]) -> None:
        items = group.items
        positions: Sequence[int] = range(len(items))
        room = self.limits.max_queue - self._queued
        if len(items) > room:
            room = max(0, room)
            positions = sorted(positions, key=lambda position: _level(items[position]))
            for position in positions[room:]:
                group.answer(position, Overloaded(f"{self.limits.max_queue} items are queued already"))
            self._refused(len(items) - room)
            positions = positions[:room]
        if self._queued:
            positions = self._in_time(group, positions)
        if not positions:
            return
        earliest: float | None = None
        for position in positions:
            item = items[position]
            level = _level(item)
            self._queue(level).append((group, position))
            self._seen_s[level] = group.entered_s
            if item.deadline_s is not None and (earliest is None or item.deadline_s < earliest):
                earliest = item.deadline_s
        self._set_queued(self._queued + len(positions))
        if earliest is not None:
            self._set_alarm(earliest)
        if self.dispatcher.has_idle or not self._running:
            # Not now: what is submitted in the same turn of the loop joins the batch.
            self._wake_soon(group.entered_s)

    def _queue(self, level: int) -> deque[_Entry[T, R]]:
        queue = self._queues.get(level)
        if queue is None:
            self._queues[level] = queue = deque()
            self._queues = dict(sorted(self._queues.items()))
        return queue

    @property
    def _urgent(self) -> int:
        """How many wait that go without company."""
        return sum(len(queue) for level, queue in self._queues.items() if level < _TIERS)

    def _in_time(self, group: _Group[T, R], positions: Sequence[int]) -> Sequence[int]:
        """Those that the queue before them lets through in time; the others are told so at once."""
        waits_s: dict[int, float] = {}
        kept = []
        for position in positions:
            item = group.items[position]
            level = _level(item)
            if level not in waits_s:
                ahead = sum(len(queue) for before, queue in self._queues.items() if before <= level)
                most = self.limits.max_batch
                waits_s[level] = self.dispatcher.wait_s(group.key, ahead, most, group.entered_s)
            done_s = group.entered_s + waits_s[level]
            if item.deadline_s is None or done_s <= item.deadline_s:
                kept.append(position)
            elif group.answer(position, DeadlineExceeded("the queue is too long for the deadline")):
                self._refused(1)
        return kept

    def _refused(self, items: int) -> None:
        self.counts.refused += items
        metrics.REFUSED.inc(items)

    # Dispatching -------------------------------------------------------------------------------

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
        now_s = asyncio.get_running_loop().time()
        for _ in range(len(self._again)):
            self._start_again(self._again.popleft(), now_s)
        while self._queued:
            ripe_s = self._ripe_s(now_s)
            if ripe_s > now_s:
                if self.dispatcher.has_idle:
                    self._wake_soon(ripe_s)
                break
            if not self._start_next(now_s):
                break
        self._check_drained()

    def _ripe_s(self, now_s: float) -> float:
        """When the next batch should leave: now if it is full, urgent or nothing is gained by waiting."""
        if self._urgent or self._closing or self._queued >= self.limits.max_batch:
            return 0.0
        queue = Queue(
            oldest_s=min(queue[0][0].entered_s for queue in self._queues.values() if queue),
            queued=self._queued,
            max_batch=self.limits.max_batch,
            running=self.dispatcher.running,
            now_s=now_s,
            predicted_s=self.dispatcher.fastest_s,
        )
        return self.waiting.ripe_s(queue)

    def _start_next(self, now_s: float) -> bool:
        """Start one batch from the queues; False where all of them are best left waiting."""
        urgent, most = self._urgent, self.limits.max_batch
        level = next(level for level, queue in self._queues.items() if queue)
        head = self._queues[level][0][0]
        reserving = self._reserving(head.key, level, now_s)
        if reserving and level > self._top and not self._room_below(head.key):
            return False
        upto = _TIERS - 1 if urgent else level if reserving and level <= self._top else _LAST
        waiting = self._queued
        if upto < _LAST:
            waiting = sum(len(queue) for at, queue in self._queues.items() if at <= upto)
        lanes = self.dispatcher.lanes
        sizes = [min(most, waiting - most * place) for place in range(min(len(lanes), -(-waiting // most)))]
        choice = self.dispatcher.choose(head.key, sizes, now_s)
        if choice is None:
            if not self.dispatcher.able(head.key):
                self._refuse_key(head.key)
                return True
            if self.dispatcher.has_idle:
                self._wake_soon(now_s + _HOLD_STEP_S)
            return False
        entries = self._take(now_s, head.key, skip=choice.place * most, upto=upto)
        if not entries and choice.place:
            # The others are of other keys.
            entries = self._take(now_s, head.key, skip=0, upto=upto)
        if entries:
            aside = reserving and level > self._top
            self._start(_Batch(head.key, entries, level=level, aside=aside), choice.lane, now_s)
        return True

    def _reserving(self, key: Hashable, level: int, now_s: float) -> bool:
        """Whether more waits than one batch can hold, and some of it could make what is above it wait.

        Then one lane is left to the highest level seen of late, which goes without company, and what is
        below runs at a low priority: who is first waits for no full batch of those who are not, and
        shares the processor with it in his favour.
        """
        if self._queued < self.limits.max_batch:
            return False
        recent = (at for at, seen_s in self._seen_s.items() if now_s - seen_s < _RESERVED_FOR_S)
        self._top = min(recent, default=level)
        return len(self.dispatcher.able(key)) > 1

    def _room_below(self, key: Hashable) -> bool:
        below = sum(batch.level > self._top for batch in self._running.values())
        return below < len(self.dispatcher.able(key)) - 1

    def _take(self, now_s: float, key: Hashable, *, skip: int, upto: int) -> list[_Entry[T, R]]:
        """Up to `max_batch` entries of one key, highest level first and none beyond `upto`, past the first
        `skip` of them. What is urgent goes without company that would make it wait."""
        batch: list[_Entry[T, R]] = []
        max_batch = self.limits.max_batch
        for level, queue in self._queues.items():
            if level > upto:
                break
            passed: list[_Entry[T, R]] = []
            while queue and len(batch) < max_batch:
                entry = queue.popleft()
                group, position = entry
                if group.key != key or skip:
                    skip -= group.key == key
                    passed.append(entry)
                    continue
                deadline_s = group.items[position].deadline_s
                if deadline_s is not None and deadline_s <= now_s:
                    self._expire(entry)
                elif group.wants(position):
                    batch.append(entry)
            queue.extendleft(reversed(passed))
        self._set_queued(sum(map(len, self._queues.values())))
        return batch

    def _refuse_key(self, key: Hashable) -> None:
        """No lane is well: nobody waits for one that may never be."""
        for queue in self._queues.values():
            kept = []
            for group, position in queue:
                if group.key != key:
                    kept.append((group, position))
                elif group.answer(position, ModelUnavailable("no engine is well at the moment")):
                    self._refused(1)
            queue.clear()
            queue.extend(kept)
        self._set_queued(sum(map(len, self._queues.values())))

    def _start_again(self, batch: _Batch[T, R], now_s: float) -> None:
        """A batch that a lane failed at, on another one; in parts where none is left that has not."""
        batch.entries = [entry for entry in batch.entries if entry[0].wants(entry[1])]
        if not batch.entries:
            return
        fresh = self.dispatcher.able(batch.key, batch.tried)
        if not fresh:
            for entry in batch.entries:
                self._fail(entry, EngineFailed("every engine that is well has failed at this"))
            return
        choice = self.dispatcher.choose(batch.key, [len(batch.entries)], now_s, batch.tried)
        if choice is None:
            self._again.append(batch)
            if self.dispatcher.has_idle:
                self._wake_soon(now_s + _HOLD_STEP_S)
            return
        self._start(batch, choice.lane, now_s)

    def _start(self, batch: _Batch[T, R], lane: Lane, now_s: float) -> None:
        loop = asyncio.get_running_loop()
        items = [group.items[position] for group, position in batch.entries]
        self._running[id(batch)] = batch
        self.counts.batches += 1
        self.counts.largest_batch = max(self.counts.largest_batch, len(items))
        batch.started_s = now_s
        lane.started(len(items), now_s)
        metrics.BATCH_ITEMS.observe(len(items))
        metrics.WAIT_SECONDS.observe(now_s - batch.entries[0][0].entered_s)
        # The last lane there is looks for the item that poisons the batch; before that another lane may do.
        alone = len(self.dispatcher.able(batch.key, batch.tried)) == 1
        work = partial(_answers, partial(lane.run, batch.key), items, in_parts=alone)
        if batch.aside:
            future = loop.run_in_executor(lane.aside, _aside, work)
        else:
            future = loop.run_in_executor(lane.executor, work)
        future.add_done_callback(partial(self._finish, lane, batch))
        hangs_s = now_s + lane.hangs_after_s(len(items), self.limits.hang_ms / 1e3)
        batch.watch = loop.call_at(hangs_s, self._hung, lane, batch)

    # Finishing ---------------------------------------------------------------------------------

    def _finish(
        self,
        lane: Lane,
        batch: _Batch[T, R],
        future: asyncio.Future[tuple[list[R | InferenceError], int, bool]],
    ) -> None:
        took_s = future.get_loop().time() - batch.started_s
        metrics.RUN_SECONDS.observe(took_s)
        whole = False
        error = None if future.cancelled() else future.exception()
        if future.cancelled() or error is not None:
            died = EngineFailed(f"the runner died: {error!r}")
            answers: list[R | InferenceError] = [died] * len(batch.entries)
            whole = True
        else:
            answers, retries, whole = future.result()
            self.counts.retried_batches += retries
        hung = self._running.pop(id(batch), None) is None
        again: list[_Entry[T, R]] = []
        answered = late = 0
        elsewhere = bool(self.dispatcher.able(batch.key, (*batch.tried, lane)))
        for entry, answer in zip(batch.entries, answers, strict=True):
            group, position = entry
            if isinstance(answer, EngineFailed):
                if hung:
                    continue
                if elsewhere and group.wants(position):
                    again.append(entry)
                else:
                    self._fail(entry, answer)
            elif not group.answer(position, answer):
                late += 1
            elif isinstance(answer, InferenceError):
                self._count_failed(1)
            else:
                answered += 1
        self.counts.answered += answered
        if not hung:
            assert batch.watch is not None
            batch.watch.cancel()
            lane.finished(len(batch.entries), took_s)
            self.waiting.observe(len(batch.entries), batch.started_s - batch.entries[0][0].entered_s, took_s)
            if whole or 2 * len(again) > len(batch.entries):
                if elsewhere or not self._is_the_keys_fault(batch, lane):
                    self._failed(lane, f"failed at a batch of {len(batch.entries)}")
            elif not again:
                lane.succeeded()
                lane.good_at = id(batch.key)
            if again:
                self._again.append(_Batch(batch.key, again, (*batch.tried, lane)))
            self._dispatch()
        self._refresh_slow()

    def _is_the_keys_fault(self, batch: _Batch[T, R], lane: Lane) -> bool:
        """A batch that failed on every lane, each of which last did well with another key: a version that
        is not well takes no lane from the others, and what it failed at before is forgiven."""
        lanes = (*batch.tried, lane)
        if any(tried.good_at in (0, id(batch.key)) for tried in lanes):
            return False
        for tried in batch.tried:
            tried.failures = max(0, tried.failures - 1)
        return True

    def _hung(self, lane: Lane, batch: _Batch[T, R]) -> None:
        """A batch that should have been answered long ago: others take it, the lane gets a new thread."""
        del self._running[id(batch)]
        took_s = asyncio.get_running_loop().time() - batch.started_s
        self._again.append(_Batch(batch.key, list(batch.entries), (*batch.tried, lane)))
        lane.busy = False
        lane.renew_thread()
        self._failed(lane, f"hangs, {took_s:.1f} s at a batch of {len(batch.entries)}", hung=True)
        self._dispatch()

    def _failed(self, lane: Lane, what: str, *, hung: bool = False) -> None:
        metrics.LANE_FAILURES.labels(lane.name).inc()
        if not lane.failed(hung=hung):
            return
        logger.warning("Lane %s %s and is taken out for %.2f s", lane.name, what, lane.pause_s)
        metrics.LANE_UP.labels(lane.name).set(0)
        if self._replace is not None:
            self._replace(lane)
        self._pause(lane)

    def _pause(self, lane: Lane) -> None:
        """Leave a lane alone for a while, then ask it whether it is well."""

        def over() -> None:
            self._pauses.discard(handle)
            if self._closing:
                return
            if lane.probe is None:
                lane.out = False  # the next live batch tells
                self._dispatch()
            else:
                self._ask(lane)

        handle = asyncio.get_running_loop().call_later(lane.pause_s, over)
        self._pauses.add(handle)

    def _ask(self, lane: Lane) -> None:
        loop = asyncio.get_running_loop()
        asked_s = lane.probed_s = loop.time()
        asking = loop.run_in_executor(lane.executor, lane.probe or (lambda: None))
        self._probes.add(asking)

        def hung() -> None:
            self._probes.discard(asking)
            lane.renew_thread()
            self._failed(lane, "hangs at its probe", hung=True)

        def told(future: asyncio.Future[None]) -> None:
            if future not in self._probes:
                return
            self._probes.discard(future)
            watch.cancel()
            if self._closing or future.cancelled():
                return
            error = future.exception()
            if error is not None:
                self._failed(lane, f"is not well yet ({error})", hung=lane.out)
                return
            if lane.out:
                logger.info("Lane %s is back", lane.name)
                metrics.LANE_UP.labels(lane.name).set(1)
                lane.profile.restart()
            else:
                lane.profile.observe(1, loop.time() - asked_s)
            lane.succeeded()
            self._dispatch()

        watch = loop.call_later(self.limits.hang_ms / 1e3, hung)
        asking.add_done_callback(told)

    def _refresh_slow(self) -> None:
        """Ask lanes that became slow, and that nobody asks any more, whether they still are."""
        now_s = asyncio.get_running_loop().time()
        for lane in self.dispatcher.lanes:
            if lane.probe is None or lane.busy or lane.out or lane.profile.scale < SLOW:
                continue
            if now_s - lane.probed_s >= _PROBE_EVERY_S and not self._closing:
                self._ask(lane)

    def _fail(self, entry: _Entry[T, R], error: InferenceError) -> None:
        group, position = entry
        if group.answer(position, error):
            self._count_failed(1)

    def _count_failed(self, items: int) -> None:
        self.counts.failed += items
        metrics.FAILED.inc(items)

    # Deadlines ---------------------------------------------------------------------------------

    def _expire(self, entry: _Entry[T, R]) -> None:
        group, position = entry
        if group.answer(position, DeadlineExceeded("the deadline passed before an engine answered")):
            self.counts.expired += 1
            metrics.EXPIRED.inc()

    def _set_alarm(self, when_s: float) -> None:
        if self._alarm is not None:
            if self._alarm_at <= when_s:
                return
            self._alarm.cancel()
        # Kept beside the handle: uvloop's has no time where that has passed.
        self._alarm_at = when_s
        self._alarm = asyncio.get_running_loop().call_at(when_s, self._ring)

    def _ring(self) -> None:
        """Answer everything whose deadline has passed, queued or running: a hung engine delays nobody."""
        self._alarm = None
        now_s = asyncio.get_running_loop().time()
        next_s: float | None = None
        batches = (*self._running.values(), *self._again)
        for entries in (*self._queues.values(), *(batch.entries for batch in batches)):
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
        for queue in self._queues.values():
            kept = [entry for entry in queue if entry[0].wants(entry[1])]
            if len(kept) < len(queue):
                queue.clear()
                queue.extend(kept)
        self._set_queued(sum(map(len, self._queues.values())))
        self._check_drained()

    def _busy(self) -> bool:
        return bool(self._queued or self._running or self._again)

    def _check_drained(self) -> None:
        if self._drained is not None and not self._drained.done() and not self._busy():
            self._drained.set_result(None)

    def _set_queued(self, items: int) -> None:
        self._queued = items
        metrics.QUEUE_ITEMS.set(items)


def _aside(work: Callable[[], Any]) -> Any:
    """For a thread that only ever does what may wait."""
    leave_room()
    return work()


def _level(item: Work) -> int:
    """Where in the order an item goes: by priority, within it by tier, the highest first."""
    return _RANK[item.priority] + _TIERS - 1 - min(max(item.tier, 0), _TIERS - 1)


def _answers(
    run: Callable[[list[Any]], Sequence[Any]], items: list[Any], *, in_parts: bool
) -> tuple[list[Any], int, bool]:
    """Run a batch, in the lane's thread; where the whole fails, in parts if told so. Also says how often
    again, and whether the whole failed."""
    most = _MAX_RETRIES if in_parts else 0
    answers, left, whole = _attempt(run, items, most)
    return answers, most - left, whole


# Not a closure: one that calls itself is a cycle, which would keep each batch and its version alive.
def _attempt(
    run: Callable[[list[Any]], Sequence[Any]], part: list[Any], left: int
) -> tuple[list[Any], int, bool]:
    """Answers, how many more runs are left of `left`, and whether all of them failed."""
    try:
        answers = list(run(part))
    except (ModelUnavailable, DeadlineExceeded, Overloaded) as error:
        return [error for _ in part], left, False
    except Exception as error:
        if isinstance(error, EngineFailed):
            logger.warning("a batch of %d failed: %s", len(part), error)
        else:
            logger.exception("a batch of %d failed", len(part))
        if len(part) > 1 and left >= 2:
            half = len(part) // 2
            first, left, first_failed = _attempt(run, part[:half], left - 2)
            second, left, second_failed = _attempt(run, part[half:], left)
            return first + second, left, first_failed and second_failed
        return [EngineFailed(f"{type(error).__name__}: {error}") for _ in part], left, True
    if len(answers) != len(part):
        told = f"asked {len(part)} questions, got {len(answers)} answers"
        return [EngineFailed(told) for _ in part], left, True
    return answers, left, False
