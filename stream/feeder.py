"""Batch-wise consumption of the hot topics: aiokafka record batches in, units of work out.

Stock Faust costs 105–125 µs a message before any work is done; a record batch handed over whole costs
that once per batch. The feeder polls, gives each topic's records to its channel as one `Unit`, and
commits what the ack sequencers release. A busy machine gets fewer and larger units (`gather_units`).
It runs inside a Faust service (`stream.app`) and knows nothing of Faust itself.

Delivery is at least once: offsets are committed after results are in Kafka, in order per partition,
before partitions are given up, and never automatically.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CommitFailedError, CorruptRecordException, IllegalStateError, KafkaError

from stream import handshake, header_keys
from stream.metrics import StreamMetrics
from stream.sequencer import AckSequencer, Slot
from stream.settings import StreamSettings
from stream.work import Unit

log = logging.getLogger(__name__)

POLL_TIMEOUT_MS = 250
FETCH_MAX_WAIT_MS = 250
REQUEST_MARGIN_MS = 5_000
# A Redis outage keeps the feeder from polling for as long as it lasts; that is not a dead consumer.
MAX_POLL_INTERVAL_MS = 24 * 3600 * 1000
# aiokafka tries a commit again for as long as there is no coordinator, and stops no sooner.
COMMIT_TIMEOUT_S = 3.0
STOP_TIMEOUT_S = 3.0
# aiokafka tells an error of its coordination once and goes on; one that stays ends the worker.
ERRORS_FOR_S = 30.0
ERROR_BACKOFF_S = 0.25
# Two workers under one instance id take it from each other at every heartbeat.
SUSPECT_ASSIGNMENTS = 5
SUSPECT_WITHIN_S = 30.0

HandOver = Callable[[Unit], Awaitable[None]]


class OffsetsWentBack(RuntimeError):
    """A partition starts before what was committed: its topic was created anew, and the epoch that
    ids and fences are made with is that of the topic before. A worker that starts again has the new one."""


class Feeder:
    """Consumes topics as one group member. `hand_over` maps a topic to where its units go; `consumer`
    stands in for aiokafka's."""

    def __init__(
        self,
        *,
        settings: StreamSettings,
        epochs: Mapping[str, int],
        hand_over: Mapping[str, HandOver],
        metrics: StreamMetrics,
        consumer: Any = None,
    ) -> None:
        self._settings = settings
        self._epochs = epochs
        self._hand_over = hand_over
        self._metrics = metrics
        rebalance_ms = max(settings.session_timeout_ms, 2 * settings.drain_timeout_ms)
        self._consumer = consumer or AIOKafkaConsumer(
            bootstrap_servers=settings.bootstrap,
            group_id=settings.group,
            group_instance_id=settings.instance_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=settings.session_timeout_ms,
            heartbeat_interval_ms=settings.session_timeout_ms // 5,
            rebalance_timeout_ms=rebalance_ms,
            # Joining is one request, answered when the slowest member has joined.
            request_timeout_ms=rebalance_ms + REQUEST_MARGIN_MS,
            max_poll_interval_ms=MAX_POLL_INTERVAL_MS,
            fetch_max_wait_ms=FETCH_MAX_WAIT_MS,
        )
        self._sequencers: dict[TopicPartition, AckSequencer] = {}
        self._committed: dict[TopicPartition, int] = {}
        self._committing = asyncio.Lock()
        self._passed: dict[TopicPartition, int] = {}
        self._positions: dict[TopicPartition, int] = {}
        self._numbers = itertools.count()
        self._received_s: dict[int, float] = {}  # units in hand, oldest first
        self._in_flight = 0
        self._room = asyncio.Event()
        self._idle = asyncio.Event()
        self._spare = asyncio.Event()
        self._room.set()
        self._idle.set()
        self._spare.set()
        self._polling = True
        self._progress_s = 0.0
        self._unassigned_s: float | None = None
        self._assigned_s: deque[float] = deque(maxlen=SUSPECT_ASSIGNMENTS)
        self.assigned = asyncio.Event()

    # Lifecycle ---------------------------------------------------------------------------------

    async def start(self) -> None:
        self._progress_s = self._unassigned_s = _now()
        header_keys.tolerate()
        handshake.bound()
        await self._consumer.start()
        self._consumer.subscribe(list(self._hand_over), listener=_Listener(self))

    async def run(self) -> None:
        """Poll until `drain`. An error that aiokafka cannot mend leaves here and ends the worker."""
        failing_since_s: float | None = None
        while self._polling:
            await self._room.wait()
            await self._gather()
            try:
                batches = await self._consumer.getmany(
                    timeout_ms=POLL_TIMEOUT_MS, max_records=self._settings.poll_max_records
                )
            except CorruptRecordException:
                # Raised while records of other partitions were collected: to go on would skip those.
                raise
            except KafkaError as error:
                failing_since_s = failing_since_s or _now()
                if _now() - failing_since_s > ERRORS_FOR_S:
                    raise
                log.warning("Polling goes on after %r", error)
                await asyncio.sleep(ERROR_BACKOFF_S)
                continue
            failing_since_s = None
            if batches and self._polling:
                await self._feed(batches)
            elif not self.lag:
                self._progress_s = _now()

    async def commit_periodically(self) -> None:
        while True:
            await asyncio.sleep(self._settings.commit_interval_ms / 1000)
            await self.commit()
            self._observe_lag()

    async def drain(self) -> bool:
        """Poll no more and wait for what is in hand; False if `drain_timeout_ms` was too short."""
        self._polling = False
        self._room.set()
        try:
            await asyncio.wait_for(self._idle.wait(), self._settings.drain_timeout_ms / 1000)
        except TimeoutError:
            log.warning("%d records are left to the next owner of their partitions", self._in_flight)
        await self.commit()
        return self._idle.is_set()

    async def stop(self) -> None:
        """Leave; a broker that is gone is not waited for longer than `STOP_TIMEOUT_S`."""
        stopping = asyncio.ensure_future(self._consumer.stop())
        if not (await asyncio.wait([stopping], timeout=STOP_TIMEOUT_S))[0]:
            log.warning("The consumer did not stop within %.0f s", STOP_TIMEOUT_S)
        else:
            stopping.result()

    # Health ------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def lag(self) -> int:
        """Records known to wait in the assigned partitions."""
        return sum(self._lags().values())

    def stalled_s(self) -> float:
        """How long the oldest record in hand has waited for its answer, or the known lag for a poll
        that finds it, or the group for an assignment; 0 where nothing waits."""
        if self._received_s:
            return _now() - next(iter(self._received_s.values()))
        if self._unassigned_s is not None:
            return _now() - self._unassigned_s
        return _now() - self._progress_s if self.lag else 0.0

    # Feeding -----------------------------------------------------------------------------------

    async def _gather(self) -> None:
        """Let records come while every processor has a unit to work on, for `gather_ms` at most."""
        if not self._spare.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.gather_ms / 1000):
                    await self._spare.wait()

    async def _feed(self, batches: dict[TopicPartition, list[Any]]) -> None:
        by_topic: dict[str, tuple[list[Any], list[tuple[AckSequencer, Slot]]]] = {}
        for partition, records in batches.items():
            if records[0].offset < self._passed.get(partition, 0):
                raise OffsetsWentBack(
                    f"{partition.topic}/{partition.partition} is at {records[0].offset} again after "
                    f"{self._passed[partition]} was committed; was the topic created anew?"
                )
            sequencer = self._sequencers.setdefault(partition, AckSequencer())
            unit_records, slots = by_topic.setdefault(partition.topic, ([], []))
            unit_records.extend(records)
            next_offset = records[-1].offset + 1
            slots.append((sequencer, sequencer.begin(next_offset)))
            self._positions[partition] = next_offset
        for topic, (unit_records, slots) in by_topic.items():
            count, number, now_s = len(unit_records), next(self._numbers), _now()
            self._progress_s = self._received_s[number] = now_s
            if len(self._received_s) >= self._settings.gather_units:
                self._spare.clear()
            self._in_flight += count
            self._idle.clear()
            if self._in_flight >= self._settings.max_in_flight:
                self._room.clear()
            self._metrics.in_flight.set(self._in_flight)
            unit = Unit(
                topic=topic,
                epoch=self._epochs[topic],
                records=unit_records,
                received_s=now_s,
                release=partial(self._release, number, slots, count),
            )
            await self._hand_over[topic](unit)

    def _release(self, number: int, slots: list[tuple[AckSequencer, Slot]], count: int) -> None:
        for sequencer, slot in slots:
            sequencer.finish(slot)
        del self._received_s[number]
        if len(self._received_s) < self._settings.gather_units:
            self._spare.set()
        self._progress_s = _now()
        self._in_flight -= count
        self._metrics.in_flight.set(self._in_flight)
        if self._in_flight < self._settings.max_in_flight:
            self._room.set()
        if not self._in_flight:
            self._idle.set()

    # Committing --------------------------------------------------------------------------------

    async def commit(self) -> None:
        """Commit what the sequencers have released since last time. A failure is tried again later.

        One at a time, and the one before a rebalance waits for its turn: a commit still under way
        afterwards would speak for partitions that others own by then.
        """
        async with self._committing:
            offsets = {
                partition: sequencer.committable
                for partition, sequencer in self._sequencers.items()
                if sequencer.committable is not None
                and sequencer.committable != self._committed.get(partition)
            }
            if not offsets:
                return
            try:
                await asyncio.wait_for(self._consumer.commit(offsets), COMMIT_TIMEOUT_S)
            except TimeoutError:
                log.warning("Offsets not committed yet: the broker did not answer")
            except (CommitFailedError, IllegalStateError) as error:
                log.info("Offsets not committed, the group is rebalancing: %s", error)
            except KafkaError as error:
                log.warning("Offsets not committed yet: %r", error)
            else:
                self._committed.update(offsets)
                self._passed.update(offsets)

    async def revoked(self) -> None:
        """Before partitions go: finish what is in hand, commit it, forget the order books."""
        self.assigned.clear()
        self._unassigned_s = _now()
        if self._in_flight:
            try:
                await asyncio.wait_for(self._idle.wait(), self._settings.drain_timeout_ms / 1000)
            except TimeoutError:
                log.warning(
                    "Rebalance with %d records in hand; their next owner repeats them", self._in_flight
                )
        await self.commit()
        self._forget()

    def received(self, partitions: set[TopicPartition]) -> None:
        """After an assignment: reading starts at the committed offsets, with new order books."""
        self._forget()
        self._metrics.rebalances.inc()
        self._progress_s = _now()
        self._unassigned_s = None
        log.info("Assigned %d partitions", len(partitions))
        self._assigned_s.append(self._progress_s)
        first_s = self._assigned_s[0]
        if len(self._assigned_s) == SUSPECT_ASSIGNMENTS and self._progress_s - first_s < SUSPECT_WITHIN_S:
            log.warning(
                "%d assignments within %.0f s; does another worker run as %r?",
                SUSPECT_ASSIGNMENTS,
                self._progress_s - first_s,
                self._settings.instance_id,
            )
        self.assigned.set()

    def _forget(self) -> None:
        self._sequencers.clear()
        self._committed.clear()
        self._positions.clear()
        self._metrics.lag.clear()

    def _lags(self) -> dict[TopicPartition, int]:
        lags: dict[TopicPartition, int] = {}
        for partition in self._consumer.assignment():
            highwater = self._consumer.highwater(partition)
            if highwater is not None and partition in self._positions:
                lags[partition] = max(0, highwater - self._positions[partition])
        return lags

    def _observe_lag(self) -> None:
        for partition, lag in self._lags().items():
            self._metrics.lag.labels(topic=partition.topic, partition=str(partition.partition)).set(lag)


class _Listener(ConsumerRebalanceListener):
    def __init__(self, feeder: Feeder) -> None:
        self._feeder = feeder

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        await self._feeder.revoked()

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        self._feeder.received(assigned)


def _now() -> float:
    return asyncio.get_running_loop().time()
