"""The request path, without Faust: records in, ranked lists out.

`clicks` is the page to read: decode → append → admit → rank → reply → release. Reading and appending
happen in arrival order; ranking and replying overlap with the units that follow. No exception leaves
it: what cannot be read becomes a dead letter, what is not admitted or cannot be ranked in time becomes
a degraded list, and a record that fails in a way nobody foresaw is found, buried, and the rest of its
unit answered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import orjson

from features.statistics import ItemStatistics
from features.store import Append, Appended, FeatureStore, StoreUnavailable, User
from inference.admission.control import Admission, Group, Ticket
from inference.errors import DeadlineExceeded, InferenceError, Overloaded
from inference.types import RankedList, RankRequest
from stream.delivery import Record, Undeliverable
from stream.fallback import Fallback
from stream.metrics import StreamMetrics
from stream.replies import (
    AnsweredClick,
    Asked,
    Listed,
    click_trigger,
    dead_letter,
    items_json,
    place_only,
    ranked,
    recommendation_id,
    replies,
    request_trigger,
    without_value,
)
from stream.settings import StreamSettings
from stream.work import LogRecord, Unit
from topics.codec import DecodeError, decode_click, decode_request
from topics.messages import BEHAVIORS, BehaviorEvent, Message, RecommendRequest

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
P = TypeVar("P")

UNFORESEEN = "unforeseen"
BEHAVIOR_CODES = {name: code for code, name in enumerate(BEHAVIORS)}


class Ranking(Protocol):
    """What the request path asks of `inference`: lists for a group, an error in the place of one."""

    async def rank(self, requests: Sequence[RankRequest]) -> list[RankedList | InferenceError]: ...


class Sender(Protocol):
    """What it asks of `stream.delivery`: return when delivered."""

    async def send(self, topic: str, records: Sequence[Record]) -> None: ...


class Click(NamedTuple):
    record: LogRecord
    event: BehaviorEvent


class Ask(NamedTuple):
    record: LogRecord
    request: RecommendRequest


# Reads and appends a unit; what it returns answers that unit.
Answering = Callable[[], Coroutine[Any, Any, None]]
Take = Callable[[Unit], Awaitable[Answering]]


class RequestPath:
    """Everything between a unit of records and its release. One per worker."""

    def __init__(
        self,
        *,
        store: FeatureStore,
        statistics: ItemStatistics,
        ranking: Ranking,
        admission: Admission,
        results: Sender,
        dead_letters: Sender,
        settings: StreamSettings,
        metrics: StreamMetrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._statistics = statistics
        self._ranking = ranking
        self._admission = admission
        self._tier_code = admission.tiers.code
        self._results = results
        self._dead_letters = dead_letters
        self._settings = settings
        self._topics = settings.topics
        self._metrics = metrics
        self._clock = clock
        self._fallback = Fallback(statistics, settings.remembered_lists)
        self._answering: set[asyncio.Task[None]] = set()
        self._store_back_s = 0.0
        self.waits_for_store = False

    async def clicks(self, unit: Unit) -> None:
        """A unit of clicks. Returns when they are in their users' sequences; the lists follow."""
        await self._serve(unit, self._take_clicks)

    async def requests(self, unit: Unit) -> None:
        """A unit of requests. Returns when their users' sequences are read; the lists follow."""
        await self._serve(unit, self._take_requests)

    async def drain(self, timeout_s: float) -> int:
        """Wait for the lists in hand; how many units were left unanswered at `timeout_s`."""
        if self._answering:
            await asyncio.wait(self._answering, timeout=timeout_s)
        left = len(self._answering)
        for task in list(self._answering):
            task.cancel()
        return left

    # Serving -----------------------------------------------------------------------------------

    async def _serve(self, unit: Unit, take: Take) -> None:
        try:
            answering = await take(unit)
        except Exception:
            # Here and not beside what follows: the next unit may not overtake these appends.
            log.exception("A unit failed and is served record by record")
            await self._one_by_one(unit, take)
            unit.release()
        else:
            self._spawn(self._answer(unit, take, answering))

    async def _answer(self, unit: Unit, take: Take, answering: Answering) -> None:
        try:
            await answering()
        except Exception:
            log.exception("A unit could not be answered and is served record by record")
            await self._one_by_one(unit, take)
        unit.release()

    async def _one_by_one(self, unit: Unit, take: Take) -> None:
        """Serve again what an unforeseen error came from. Appends that were made are not made again."""
        for record in unit.records:
            try:
                answering = await take(replace(unit, records=(record,), received_s=_now()))
                await answering()
            except Exception as error:
                log.exception("A record cannot be answered and becomes a dead letter")
                self._metrics.dead_letters.labels(reason=UNFORESEEN).inc()
                await self._bury([dead_letter(record, reason=UNFORESEEN, detail=repr(error))])

    async def _take_clicks(self, unit: Unit) -> Answering:
        clicks, refused = self._read_clicks(unit)
        started_s = _now()
        appended, degrading = await self._append(unit, clicks)
        self._metrics.store_s.observe(_now() - started_s)
        return partial(self._answer_clicks, unit, clicks, appended, refused, degrading)

    async def _take_requests(self, unit: Unit) -> Answering:
        asks, refused = self._read_requests(unit)
        try:
            users: Sequence[User] | None = await self._store.read([ask.request.user_id for ask in asks])
        except StoreUnavailable as error:
            log.warning("Answering %d requests without history: %s", len(asks), error)
            users = None
        return partial(self._answer_requests, unit, asks, users, refused)

    # Reading -----------------------------------------------------------------------------------

    def _read_clicks(self, unit: Unit) -> tuple[list[Click], list[Record]]:
        decode = partial(decode_click, now_s=self._clock(), max_bytes=self._settings.max_value_bytes)
        clicks, refused = self._read(unit, decode, Click)
        self._metrics.clicks.inc(len(clicks))
        return clicks, refused

    def _read_requests(self, unit: Unit) -> tuple[list[Ask], list[Record]]:
        decode = partial(decode_request, max_bytes=self._settings.max_value_bytes)
        asks, refused = self._read(unit, decode, Ask)
        self._metrics.requests.inc(len(asks))
        return asks, refused

    def _read(
        self, unit: Unit, decode: Callable[..., M], pair: Callable[[LogRecord, M], P]
    ) -> tuple[list[P], list[Record]]:
        """Each record with its message, and a dead letter for each that has none."""
        read: list[P] = []
        refused: list[Record] = []
        for record in unit.records:
            try:
                message = decode(record.key, record.value, record.headers)
            except DecodeError as error:
                refused.append(self._refuse(record, error))
            else:
                read.append(pair(record, message))
        return read, refused

    def _refuse(self, record: LogRecord, error: DecodeError) -> Record:
        self._metrics.dead_letters.labels(reason=error.reason).inc()
        return dead_letter(record, reason=error.reason, detail=str(error))

    # Sequences ---------------------------------------------------------------------------------

    async def _append(
        self, unit: Unit, clicks: Sequence[Click]
    ) -> tuple[list[Appended], asyncio.Task[None] | None]:
        """Append until the store has taken it: a click may wait for Redis, it may not miss its
        sequence. While the store is away its users get degraded lists at once (the task)."""
        if not clicks:
            return [], None
        appends = [
            Append(
                event.user_id,
                event.item_id,
                event.category_id,
                BEHAVIOR_CODES[event.behavior],
                event.timestamp,
                unit.epoch,
                record.partition,
                record.offset,
            )
            for record, event in clicks
        ]
        names = self._statistics.needed(appends)
        retry_s = self._settings.retry_min_ms / 1000
        degrading: asyncio.Task[None] | None = None
        try:
            while True:
                try:
                    appended, neighbours = await self._store.append(
                        appends, neighbours=names, limit=self._statistics.limit
                    )
                    break
                except StoreUnavailable as error:
                    self._metrics.store_failures.inc()
                    self.waits_for_store = True
                    if degrading is None:
                        log.warning("Sequences cannot be written, clicks wait and answers degrade: %s", error)
                        degrading = self._spawn(self._send_degraded(unit, clicks))
                    await asyncio.sleep(retry_s)
                    retry_s = min(2 * retry_s, self._settings.retry_max_ms / 1000)
        finally:
            self.waits_for_store = False
        if degrading is not None:
            self._store_back_s = _now()
        self._statistics.absorb(names, neighbours)
        self._statistics.observe(appends, appended)
        return appended, degrading

    async def _send_degraded(self, unit: Unit, clicks: Sequence[Click]) -> None:
        """Lists for clicks whose sequence cannot be written now. The full list follows later under
        the same id."""
        answers = [self._click_answer(unit, [click]) for click in clicks]
        await self._deliver(answers, self._degraded(answers), [])

    # Answering ---------------------------------------------------------------------------------

    async def _answer_clicks(
        self,
        unit: Unit,
        clicks: Sequence[Click],
        appended: Sequence[Appended],
        refused: Sequence[Record],
        degrading: asyncio.Task[None] | None,
    ) -> None:
        answered = _by_user(clicks) if self._settings.trigger == "user" else [[c] for c in range(len(clicks))]
        # What waited for the store has its full time once the store is back.
        from_s = max(unit.received_s, self._store_back_s)
        deadline_s = from_s + self._settings.click_deadline_ms / 1000
        answers = [self._click_answer(unit, [clicks[c] for c in group]) for group in answered]
        asked = [
            RankRequest(
                user_id=clicks[group[-1]].event.user_id,
                sequence=appended[group[-1]].sequence,
                k=self._settings.k,
                deadline_s=deadline_s,
                tier=self._tier_code(appended[group[-1]].tier),
            )
            for group in answered
        ]
        if degrading is not None:
            # The full list comes after the degraded one of the same id, also when Kafka is slow.
            await asyncio.wait([degrading])
        await self._rank_and_deliver(unit, answers, asked, refused)

    async def _answer_requests(
        self,
        unit: Unit,
        asks: Sequence[Ask],
        users: Sequence[User] | None,
        refused: Sequence[Record],
    ) -> None:
        answers = [self._request_answer(unit, ask) for ask in asks]
        if users is None:
            await self._deliver(answers, self._degraded(answers), refused)
            return
        default_ms = self._settings.click_deadline_ms
        asked = [
            RankRequest(
                user_id=ask.request.user_id,
                sequence=user.sequence,
                k=ask.request.k,
                candidates=None if ask.request.candidates is None else tuple(ask.request.candidates),
                exclude=tuple(ask.request.exclude),
                priority=ask.request.priority,
                deadline_s=unit.received_s + (ask.request.deadline_ms or default_ms) / 1000,
                tier=self._tier_code(user.tier),
            )
            for ask, user in zip(asks, users, strict=True)
        ]
        await self._rank_and_deliver(unit, answers, asked, refused)

    async def _rank_and_deliver(
        self, unit: Unit, answers: list[Asked], asked: list[RankRequest], refused: Sequence[Record]
    ) -> None:
        """Who is not admitted has a degraded list at once; the top tier does not wait for the others."""
        now_s = _now()
        wait_ms = (now_s - unit.received_s) * 1000
        ticket = self._admission.admit(asked, now_s)
        ranking = [self._rank_group(group, answers, wait_ms) for group in ticket.groups]
        try:
            if not (ticket.refused or refused) and len(ranking) == 1:
                await ranking[0]
                return
            self._count_refused(asked, ticket)
            shed = [answers[at] for at in ticket.refused]
            async with asyncio.TaskGroup() as together:
                for part in (*ranking, self._deliver_shed(shed, self._degraded(shed), refused)):
                    together.create_task(part)
        finally:
            # Also those whose task was cancelled before it began.
            for group in ticket.groups:
                self._admission.finish(group, _now())

    async def _deliver_shed(
        self, shed: Sequence[Asked], lists: Sequence[Listed], refused: Sequence[Record]
    ) -> None:
        # Two turns of the loop later: by then who is ranked is on the way to an engine.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await self._deliver(shed, lists, refused)

    async def _rank_group(self, group: Group, answers: Sequence[Asked], wait_ms: float) -> None:
        outcomes = await self._rank(group.requests)
        self._admission.finish(group, _now(), outcomes)
        self._count_late(group.requests, outcomes)
        asked = [answers[at] for at in group.positions]
        await self._deliver(asked, self._lists(asked, outcomes, wait_ms), [])

    async def _rank(self, asked: Sequence[RankRequest]) -> Sequence[RankedList | InferenceError]:
        started_s = _now()
        try:
            return await self._ranking.rank(asked)
        except InferenceError as error:
            return [error] * len(asked)
        finally:
            self._metrics.rank_s.observe(_now() - started_s)

    def _count_refused(self, asked: Sequence[RankRequest], ticket: Ticket) -> None:
        names = self._admission.tiers.names
        shed = Counter((refusal.reason, asked[at].tier) for at, refusal in ticket.refused.items())
        for (reason, tier), count in shed.items():
            self._metrics.shed.labels(reason=reason, tier=names[tier]).inc(count)

    def _count_late(
        self, asked: Sequence[RankRequest], outcomes: Sequence[RankedList | InferenceError]
    ) -> None:
        names = self._admission.tiers.names
        late = Counter(
            ("late" if isinstance(outcome, DeadlineExceeded) else "queue", request.tier)
            for request, outcome in zip(asked, outcomes, strict=True)
            if isinstance(outcome, (DeadlineExceeded, Overloaded))
        )
        for (reason, tier), count in late.items():
            self._metrics.shed.labels(reason=reason, tier=names[tier]).inc(count)

    async def _deliver(
        self, asked: Sequence[Asked], lists: Sequence[Listed], refused: Sequence[Record]
    ) -> None:
        """Lists and dead letters into Kafka; returns when the broker has them."""
        sends: list[Awaitable[None]] = []
        if asked:
            records = replies(asked, lists, self._clock())
            sends.append(self._results.send(self._topics.recommendations, records))
        if refused:
            sends.append(self._bury(refused))
        if len(sends) == 1:
            await sends[0]
        else:
            await asyncio.gather(*sends)
        now_s = self._clock()
        for degraded, count in Counter(listed.degraded or "no" for listed in lists).items():
            self._metrics.lists.labels(degraded=degraded).inc(count)
        self._metrics.click_to_result_s.observe_all([max(0.0, now_s - one.asked_at_s) for one in asked])

    async def _bury(self, refused: Sequence[Record]) -> None:
        """Dead letters into Kafka, untouched where the broker takes them. One that is too large loses
        what is largest, and says so; the others lose nothing."""
        try:
            await self._dead_letters.send(self._topics.dead_letters, refused)
        except Undeliverable as error:
            if len(refused) > 1:
                for letter in refused:
                    await self._bury([letter])
                return
            log.error("A dead letter is too large to be kept whole: %s", error)
            try:
                await self._dead_letters.send(self._topics.dead_letters, [without_value(refused[0])])
            except Undeliverable:
                await self._dead_letters.send(self._topics.dead_letters, [place_only(refused[0])])

    # Answers -----------------------------------------------------------------------------------

    def _click_answer(self, unit: Unit, clicks: Sequence[Click]) -> Asked:
        newest = clicks[-1]
        named = [
            AnsweredClick(event.event_id, event.item_id, unit.topic, record.partition, record.offset)
            for record, event in clicks
        ]
        return Asked(
            recommendation_id(unit.topic, unit.epoch, newest.record.partition, newest.record.offset),
            newest.event.user_id,
            self._settings.k,
            newest.record.timestamp / 1000,
            click_trigger(named),
        )

    def _request_answer(self, unit: Unit, ask: Ask) -> Asked:
        record, request = ask
        return Asked(
            recommendation_id(unit.topic, unit.epoch, record.partition, record.offset),
            request.user_id,
            request.k,
            record.timestamp / 1000,
            request_trigger(request.request_id),
            frozenset(request.exclude),
            None if request.candidates is None else tuple(request.candidates),
        )

    def _degraded(self, asked: Sequence[Asked]) -> list[Listed]:
        return [self._fallback.list_for(one) for one in asked]

    def _lists(
        self, asked: Sequence[Asked], outcomes: Sequence[RankedList | InferenceError], wait_ms: float
    ) -> list[Listed]:
        lists: list[Listed] = []
        timed: dict[str, float] | None = None
        timings = b"{}"
        for one, outcome in zip(asked, outcomes, strict=True):
            if isinstance(outcome, InferenceError):
                lists.append(self._fallback.list_for(one))
                continue
            if outcome.timings_ms is not timed:
                # Lists of one batch share theirs.
                timed = outcome.timings_ms
                timings = orjson.dumps({n: round(ms, 3) for n, ms in {"wait": wait_ms, **timed}.items()})
            size = len(outcome.items)
            items = items_json(
                outcome.items, outcome.scores, outcome.sources, outcome.model_version, outcome.engine
            )
            lists.append(ranked(items, size, timings))
            self._fallback.remember(one, items, size)
        return lists

    def _spawn(self, answering: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(answering)
        self._answering.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._answering.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # The unit stays unreleased: its offsets are not committed, and /healthz turns red.
            self._metrics.unanswered_units.inc()
            log.error("A unit could not be answered and will be read again", exc_info=error)


def _by_user(clicks: Sequence[Click]) -> list[list[int]]:
    """Positions of clicks grouped by user, in order of each user's first click."""
    groups: dict[int, list[int]] = {}
    for position, click in enumerate(clicks):
        groups.setdefault(click.event.user_id, []).append(position)
    return list(groups.values())


def _now() -> float:
    return asyncio.get_running_loop().time()
