"""First item waits, the rest fill until size or time; an answer for every question.

A batcher owns a bounded queue and the lanes of a dispatcher. Nothing ticks while it is empty. Every
failure is a value in the answers, so one item's trouble is never another's:

>>> answers = await batcher.submit([request, request], key=version)
>>> [type(answer).__name__ for answer in answers]
['RankedList', 'Overloaded']

A batch holds items of one key only. What a lane fails at goes to another lane; a lane that hangs,
keeps failing or answers with failures is taken out until a probe says that it is well. The order in
which items wait is in `queues`, which lanes are well in `lane_health`, the timer in `deadlines`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Generic, TypeVar

from inference import metrics
from inference.attempts import answers_of
from inference.deadlines import Alarm
from inference.dispatcher import Dispatcher, Lane
from inference.errors import DeadlineExceeded, EngineFailed, InferenceError, ModelUnavailable, Overloaded
from inference.lane_health import LaneHealth
from inference.metrics import BatcherCounts
from inference.precedence import Precedence
from inference.queues import LAST, URGENT, Entry, Group, Queues, Work, level_of, wants
from inference.waiting import Gather, Queue, Waiting

# A batch held back for a busy lane is looked at again after so long, should that lane be late.
_HOLD_STEP_S: Final = 0.001
# While a lane is kept for others, what has none of its own goes in batches of so many.
_BELOW_MOST: Final = 8
# Of the time that an answer may take so much is left for its way, but no more than that: a busy event loop
# looks at a deadline some milliseconds late, and what is to be said then is still to be written.
_WAY: Final = 0.05
_LONGEST_WAY_S: Final = 0.01
# Of those without a lane of their own, whoever might not be ranked in time is told so at once: told at his
# deadline, he has waited for nothing, and one hiccup makes the answer late.
_CAUTION: Final = 1.25

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


@dataclass(slots=True, eq=False)
class _Batch(Generic[T, R]):
    """Entries that go through a lane together, and the lanes that have failed at them."""

    key: Hashable
    entries: list[Entry[T, R]]
    tried: tuple[Lane, ...] = ()
    level: int = 0
    started_s: float = 0.0
    watch: asyncio.TimerHandle | None = None


class Batcher(Generic[T, R]):
    """Groups in, batches to lanes, answers out. Used from one event loop.

    `replace` is called with a lane that was taken out, or has become slow: it may give the lane a new
    engine, before the lane is probed, and says whether it has.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        limits: BatcherLimits | None = None,
        *,
        replace: Callable[[Lane], bool] | None = None,
        waiting: Waiting | None = None,
    ) -> None:
        self.limits = limits or BatcherLimits()
        self.waiting = waiting or Gather(self.limits.wait_ms / 1e3, self.limits.spread_ms / 1e3)
        self.counts = BatcherCounts()
        self.dispatcher = Dispatcher(lanes)
        self._health = LaneHealth(
            self.dispatcher.lanes, hang_s=self.limits.hang_ms / 1e3, changed=self._dispatch, replace=replace
        )
        self._queues: Queues[T, R] = Queues()
        self._precedence = Precedence()
        self._again: deque[_Batch[T, R]] = deque()
        self._running: dict[int, _Batch[T, R]] = {}
        self._wake: asyncio.Handle | None = None
        self._wake_at = 0.0
        self._alarm = Alarm(self._expire_due)
        self._closing = False
        self._drained: asyncio.Future[None] | None = None

    @property
    def queued(self) -> int:
        return len(self._queues)

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
        group: Group[T, R] = Group(items, key, loop.create_future(), loop.time())
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
        left = self.queued + self.running
        for group, position in self._unanswered():
            group.answer(position, ModelUnavailable("the batcher closed before an engine answered"))
        for batch in (*self._running.values(), *self._again):
            if batch.watch is not None:
                batch.watch.cancel()
        self._queues.clear()
        self._again.clear()
        self._tell_queued()
        self._alarm.cancel()
        self._health.close()
        for lane in self.dispatcher.lanes:
            lane.executor.shutdown(wait=not lane.busy and not self._health.is_asking, cancel_futures=True)
        return not left

    # Entering ----------------------------------------------------------------------------------

    def _enqueue(self, group: Group[T, R]) -> None:
        items = group.items
        positions: Sequence[int] = range(len(items))
        room = self.limits.max_queue - self.queued
        if len(items) > room:
            room = max(0, room)
            positions = sorted(positions, key=lambda position: level_of(items[position]))
            for position in positions[room:]:
                group.answer(position, Overloaded(f"{self.limits.max_queue} items are queued already"))
            self._refused(len(items) - room)
            positions = positions[:room]
        if self._queues:
            positions = self._in_time(group, positions)
        if not positions:
            return
        earliest: float | None = None
        for position in positions:
            level = level_of(items[position])
            entry = group, position
            self._queues.add(level, entry)
            self._precedence.came(level, group.entered_s)
            due_s = _due_s(entry)
            if due_s is not None and (earliest is None or due_s < earliest):
                earliest = due_s
        self._tell_queued()
        if earliest is not None:
            self._alarm.set(earliest)
        if self.dispatcher.has_idle or not self._running:
            # Not now: what is submitted in the same turn of the loop joins the batch.
            self._wake_soon(group.entered_s)

    def _in_time(self, group: Group[T, R], positions: Sequence[int]) -> Sequence[int]:
        """Those that the queue before them lets through in time; the others are told so at once."""
        waits_s: dict[int, float] = {}
        kept = []
        for position in positions:
            due_s = _due_s((group, position))
            if due_s is None:
                kept.append(position)
                continue
            level = level_of(group.items[position])
            if level not in waits_s:
                waits_s[level] = self._wait_s(group.key, level, group.entered_s)
            done_s = group.entered_s + waits_s[level]
            if done_s <= due_s:
                kept.append(position)
            elif group.answer(position, DeadlineExceeded("the queue is too long for the deadline")):
                self._refused(1)
        return kept

    def _wait_s(self, key: Hashable, level: int, now_s: float) -> float:
        """Until something that comes now at a level is predicted to be answered."""
        most = self.limits.max_batch
        top = self._reserved_for(key, level, now_s)
        if top is None or level <= top:
            return self.dispatcher.wait_s(key, self._queues.upto(level), most, now_s)
        # Those above have a lane to themselves; they take nothing of the others.
        ahead = self._queues.upto(level) - self._queues.upto(top)
        return _CAUTION * self.dispatcher.wait_s(key, ahead, most, now_s, kept=1)

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
        while self._queues:
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
        full = self.queued >= self.limits.max_batch
        if full:
            self._precedence.crowded(now_s)
        if full or self._queues.urgent or self._closing or self._goes_first(now_s):
            return 0.0
        queue = Queue(
            oldest_s=self._queues.oldest_s,
            queued=self.queued,
            max_batch=self.limits.max_batch,
            running=self.dispatcher.running,
            now_s=now_s,
            predicted_s=self.dispatcher.fastest_s,
        )
        return self.waiting.ripe_s(queue)

    def _goes_first(self, now_s: float) -> bool:
        """Whether what is next has a lane kept for it, and gains nothing from company on that."""
        return self._precedence.counts(now_s) and self._precedence.precedes(self._queues.first[0], now_s)

    def _start_next(self, now_s: float) -> bool:
        """Start one batch from the queues; False where all of them are best left waiting."""
        most = self.limits.max_batch
        level, head = self._queues.first
        top = self._reserved_for(head.key, level, now_s)
        below = top is not None and level > top
        if top is not None and below:
            levels = [batch.level for batch in self._running.values()]
            start_s = self._precedence.below_at_s(levels, top, len(self.dispatcher.able(head.key)), now_s)
            if start_s is None:
                return False
            if start_s > now_s:
                self._wake_soon(start_s)
                return False
            most = min(most, _BELOW_MOST)
        alone = level if top is not None and not below else LAST
        upto = URGENT - 1 if self._queues.urgent else alone
        waiting = self._queues.upto(upto)
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
        entries = self._queues.take(head.key, most, skip=choice.place * most, upto=upto)
        if not entries and choice.place:
            # The others are of other keys.
            entries = self._queues.take(head.key, most, skip=0, upto=upto)
        self._tell_queued()
        entries = [entry for entry in entries if not self._expire_late(entry, now_s)]
        if entries:
            self._start(_Batch(head.key, entries, level=level), choice.lane, now_s)
        return True

    def _reserved_for(self, key: Hashable, level: int, now_s: float) -> int | None:
        """The highest level seen of late, while more waits than one batch can hold, or did lately; else None.

        One lane is then left to it, and it goes without company: who is first waits for no full batch of
        those who are not. No thread has a lower priority than another: one that is kept off the processor
        while it has the interpreter's lock keeps all others waiting.
        """
        if not self._precedence.counts(now_s) or len(self.dispatcher.able(key)) < 2:
            return None
        return self._precedence.top(now_s, level)

    def _refuse_key(self, key: Hashable) -> None:
        """No lane is well: nobody waits for one that may never be."""
        for group, position in self._queues:
            ill = ModelUnavailable("no engine is well at the moment")
            if group.key == key and group.answer(position, ill):
                self._refused(1)
        self._queues.keep(lambda entry: entry[0].key != key)
        self._tell_queued()

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
        work = partial(answers_of, partial(lane.run, batch.key), items, in_parts=alone)
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
        again: list[Entry[T, R]] = []
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
                    self._health.failed(lane, f"failed at a batch of {len(batch.entries)}")
            elif not again:
                lane.succeeded()
                lane.good_at = id(batch.key)
            if again:
                self._again.append(_Batch(batch.key, again, (*batch.tried, lane)))
            self._dispatch()
        self._health.refresh_slow()

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
        self._health.failed(lane, f"hangs, {took_s:.1f} s at a batch of {len(batch.entries)}", hung=True)
        self._dispatch()

    def _fail(self, entry: Entry[T, R], error: InferenceError) -> None:
        group, position = entry
        if group.answer(position, error):
            self._count_failed(1)

    def _count_failed(self, items: int) -> None:
        self.counts.failed += items
        metrics.FAILED.inc(items)

    # Deadlines ---------------------------------------------------------------------------------

    def _expire_due(self, now_s: float) -> float | None:
        """Answer everything whose deadline has passed, queued or running: a hung engine delays nobody.
        Returns the next deadline there is."""
        next_s: float | None = None
        for entry in self._unanswered():
            due_s = _due_s(entry)
            if due_s is None or not wants(entry):
                continue
            if due_s <= now_s:
                self._expire(entry)
            elif next_s is None or due_s < next_s:
                next_s = due_s
        self._sweep()
        return next_s

    def _expire_late(self, entry: Entry[T, R], now_s: float) -> bool:
        """Whether the time for an answer has passed; the item has been told so then."""
        due_s = _due_s(entry)
        if due_s is None or due_s > now_s:
            return False
        self._expire(entry)
        return True

    def _expire(self, entry: Entry[T, R]) -> None:
        group, position = entry
        if group.answer(position, DeadlineExceeded("the deadline passed before an engine answered")):
            self.counts.expired += 1
            metrics.EXPIRED.inc()

    def _unanswered(self) -> Iterator[Entry[T, R]]:
        """What is queued, what runs, and what is to be run again."""
        yield from self._queues
        for batch in (*self._running.values(), *self._again):
            yield from batch.entries

    def _forget(self, group: Group[T, R]) -> None:
        self.counts.cancelled += group.missing
        self._sweep()

    def _sweep(self) -> None:
        """Give back the room of queued items that no longer want an answer."""
        self._queues.keep(wants)
        self._tell_queued()
        self._check_drained()

    def _busy(self) -> bool:
        return bool(len(self._queues) or self._running or self._again)

    def _check_drained(self) -> None:
        if self._drained is not None and not self._drained.done() and not self._busy():
            self._drained.set_result(None)

    def _tell_queued(self) -> None:
        metrics.QUEUE_ITEMS.set(len(self._queues))


def _due_s(entry: Entry[Any, Any]) -> float | None:
    """When there has to be an answer, so that it is where it is wanted by its deadline; None without one."""
    group, position = entry
    deadline_s: float | None = group.items[position].deadline_s
    if deadline_s is None:
        return None
    return deadline_s - min(_WAY * max(0.0, deadline_s - group.entered_s), _LONGEST_WAY_S)
