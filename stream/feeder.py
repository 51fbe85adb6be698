"""Batch-wise consumption of the hot topics: aiokafka record batches in, units of work out.

Stock Faust costs 105–125 µs a message before any work is done; a record batch handed over whole costs
that once per batch. The feeder polls, gives each topic's records to its channel as one `Unit`, and
commits what the ack sequencers release. It runs inside a Faust service (`stream.app`) and knows
nothing of Faust itself.

Delivery is at least once: offsets are committed after results are in Kafka, in order per partition,
before partitions are given up, and never automatically.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

from stream.metrics import StreamMetrics
from stream.sequencer import AckSequencer, Slot
from stream.settings import StreamSettings
from stream.work import Unit

log = logging.getLogger(__name__)

POLL_TIMEOUT_MS = 250
FETCH_MAX_WAIT_MS = 250
# A Redis outage keeps the feeder from polling for as long as it lasts; that is not a dead consumer.
MAX_POLL_INTERVAL_MS = 24 * 3600 * 1000

HandOver = Callable[[Unit], Awaitable[None]]


class Feeder:
    """Consumes topics as one group member. `hand_over` maps a topic to where its units go."""

    def __init__(
        self,
        *,
        settings: StreamSettings,
        epochs: Mapping[str, int],
        hand_over: Mapping[str, HandOver],
        metrics: StreamMetrics,
    ) -> None:
        self._settings = settings
        self._epochs = epochs
        self._hand_over = hand_over
        self._metrics = metrics
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=settings.bootstrap,
            group_id=settings.group,
            group_instance_id=settings.instance_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=settings.session_timeout_ms,
            heartbeat_interval_ms=settings.session_timeout_ms // 5,
            rebalance_timeout_ms=max(settings.session_timeout_ms, 2 * settings.drain_timeout_ms),
            max_poll_interval_ms=MAX_POLL_INTERVAL_MS,
            fetch_max_wait_ms=FETCH_MAX_WAIT_MS,
        )
        self._sequencers: dict[TopicPartition, AckSequencer] = {}
        self._committed: dict[TopicPartition, int] = {}
        self._positions: dict[TopicPartition, int] = {}
        self._in_flight = 0
        self._room = asyncio.Event()
        self._idle = asyncio.Event()
        self._room.set()
        self._idle.set()
        self._polling = True
        self._progress_s = 0.0
        self.assigned = asyncio.Event()

    # Lifecycle ---------------------------------------------------------------------------------

    async def start(self) -> None:
        self._progress_s = _now()
        await self._consumer.start()
        self._consumer.subscribe(list(self._hand_over), listener=_Listener(self))

    async def run(self) -> None:
        """Poll until `drain`. An error that aiokafka cannot mend leaves here and ends the worker."""
        while self._polling:
            await self._room.wait()
            batches = await self._consumer.getmany(
                timeout_ms=POLL_TIMEOUT_MS, max_records=self._settings.poll_max_records
            )
            if batches:
                await self._feed(batches)

    async def commit_periodically(self) -> None:
        while True:
            await asyncio.sleep(self._settings.commit_interval_ms / 1000)
            await self.commit()
            self._observe_lag()

    async def drain(self) -> bool:
        """Poll no more and wait for what is in hand; False if `drain_timeout_ms` was too short."""
        self._polling = False
        try:
            await asyncio.wait_for(self._idle.wait(), self._settings.drain_timeout_ms / 1000)
        except TimeoutError:
            log.warning("%d records are left to the next owner of their partitions", self._in_flight)
        await self.commit()
        return self._idle.is_set()

    async def stop(self) -> None:
        await self._consumer.stop()

    # Health ------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def lag(self) -> int:
        """Records known to wait in the assigned partitions."""
        return sum(self._lags().values())

    def stalled_s(self) -> float:
        """How long records have waited without one being answered; 0 where nothing waits."""
        return _now() - self._progress_s if self._in_flight or self.lag else 0.0

    # Feeding -----------------------------------------------------------------------------------

    async def _feed(self, batches: dict[TopicPartition, list[Any]]) -> None:
        by_topic: dict[str, tuple[list[Any], list[tuple[AckSequencer, Slot]]]] = {}
        for partition, records in batches.items():
            sequencer = self._sequencers.setdefault(partition, AckSequencer())
            unit_records, slots = by_topic.setdefault(partition.topic, ([], []))
            unit_records.extend(records)
            next_offset = records[-1].offset + 1
            slots.append((sequencer, sequencer.begin(next_offset)))
            self._positions[partition] = next_offset
        for topic, (unit_records, slots) in by_topic.items():
            count = len(unit_records)
            if not self._in_flight:
                self._progress_s = _now()
            self._in_flight += count
            self._idle.clear()
            if self._in_flight >= self._settings.max_in_flight:
                self._room.clear()
            self._metrics.in_flight.set(self._in_flight)
            unit = Unit(
                topic=topic,
                epoch=self._epochs[topic],
                records=unit_records,
                received_s=_now(),
                release=partial(self._release, slots, count),
            )
            await self._hand_over[topic](unit)

    def _release(self, slots: list[tuple[AckSequencer, Slot]], count: int) -> None:
        for sequencer, slot in slots:
            sequencer.finish(slot)
        self._progress_s = _now()
        self._in_flight -= count
        self._metrics.in_flight.set(self._in_flight)
        if self._in_flight < self._settings.max_in_flight:
            self._room.set()
        if not self._in_flight:
            self._idle.set()

    # Committing --------------------------------------------------------------------------------

    async def commit(self) -> None:
        """Commit what the sequencers have released since last time. A failure is tried again later."""
        offsets = {
            partition: sequencer.committable
            for partition, sequencer in self._sequencers.items()
            if sequencer.committable is not None and sequencer.committable != self._committed.get(partition)
        }
        if not offsets:
            return
        try:
            await self._consumer.commit(offsets)
        except (CommitFailedError, IllegalStateError) as error:
            log.info("Offsets not committed, the group is rebalancing: %s", error)
        except KafkaError as error:
            log.warning("Offsets not committed yet: %r", error)
        else:
            self._committed.update(offsets)

    async def revoked(self) -> None:
        """Before partitions go: finish what is in hand, commit it, forget the order books."""
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
        log.info("Assigned %d partitions", len(partitions))
        self.assigned.set()

    def _forget(self) -> None:
        self._sequencers.clear()
        self._committed.clear()
        self._positions.clear()

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
