"""Handing records to Kafka and waiting until they are there.

Records of one call travel as one batch per partition (aiokafka's batch interface: one future per
batch, not per record). The producer is idempotent and waits for all replicas; what cannot be
delivered is tried again until it can or the worker stops, so a broker outage delays results and
loses none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from aiokafka.partitioner import murmur2

from stream import handshake

log = logging.getLogger(__name__)

MAX_BATCH_BYTES = 128 * 1024
MAX_REQUEST_BYTES = 16 * 1024 * 1024
REQUEST_TIMEOUT_MS = 15_000
MAX_HASHED_BYTES = 64


class Undeliverable(RuntimeError):
    """The broker will never take this record (it is too large)."""


class Backoff(NamedTuple):
    """How long to wait before trying again: from `min_s`, doubling, to `max_s`."""

    min_s: float = 0.05
    max_s: float = 1.0


class Record(NamedTuple):
    """One record on its way out."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]] = ()


@lru_cache(maxsize=65_536)
def _key_hash(key: bytes) -> int:
    """Java's murmur2, non-negative; kept per key because the pure-Python hash costs microseconds."""
    return int(murmur2(key)) & 0x7FFFFFFF


class Delivery:
    """A producer whose `send` returns when every record is acknowledged by all in-sync replicas.

    `idempotent` keeps retries inside the producer from duplicating or reordering records. A record
    that a broker refuses for its size would leave a hole in an idempotent producer's sequence, so
    dead letters (whose size others decide) go through one that is not.
    """

    def __init__(self, bootstrap: str, backoff: Backoff | None = None, *, idempotent: bool = True) -> None:
        backoff = backoff or Backoff()
        self._options: dict[str, Any] = {
            "bootstrap_servers": bootstrap,
            "acks": "all",
            "enable_idempotence": idempotent,
            "linger_ms": 0,
            "max_batch_size": MAX_BATCH_BYTES,
            "max_request_size": MAX_REQUEST_BYTES,
            "request_timeout_ms": REQUEST_TIMEOUT_MS,
            "retry_backoff_ms": int(backoff.min_s * 1000),
        }
        self._backoff = backoff
        self._producer: Any = None
        self._renewing = asyncio.Lock()

    async def start(self) -> None:
        handshake.bound()
        self._producer = AIOKafkaProducer(**self._options)
        await self._producer.start()

    async def stop(self, timeout_s: float = 3.0) -> None:
        """Flush and leave; a broker that is gone is not waited for longer than `timeout_s`."""
        producer, self._producer = self._producer, None
        if producer is None:
            return
        try:
            await asyncio.wait_for(producer.stop(), timeout_s)
        except TimeoutError:
            log.warning("The producer did not flush within %.0f s; unsent results are made again", timeout_s)

    async def send(self, topic: str, records: Sequence[Record]) -> None:
        """Deliver all, trying again as long as it takes. Raises `Undeliverable` only."""
        pending = list(records)
        wait_s = self._backoff.min_s
        while pending:
            pending = await self._attempt(topic, pending)
            if pending:
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, self._backoff.max_s)

    async def _attempt(self, topic: str, records: list[Record]) -> list[Record]:
        """Send once; returns the records that are to be tried again."""
        producer = self._producer
        if producer is None:
            raise asyncio.CancelledError("the worker is stopping")
        try:
            batches = await _enqueue(producer, topic, records)
        except KafkaError as error:
            log.warning("Cannot send to %s yet: %r", topic, error)
            return records
        await asyncio.wait([future for future, _ in batches])
        failed: list[Record] = []
        for future, sent in batches:
            failure = future.exception()
            if failure is None:
                continue
            if isinstance(failure, MessageSizeTooLargeError):
                if len(sent) == 1:
                    raise Undeliverable(f"{topic} does not take a record of this size") from failure
                for record in sent:
                    await self.send(topic, [record])
                continue
            log.warning("A batch of %d for %s failed and is sent again: %r", len(sent), topic, failure)
            failed.extend(sent)
            if not getattr(failure, "retriable", False):
                await self._renew(producer)
        return failed

    async def _renew(self, broken: AIOKafkaProducer) -> None:
        """A producer whose sequence the broker no longer accepts stays broken: replace it once."""
        async with self._renewing:
            if self._producer is not broken:
                return
            fresh = AIOKafkaProducer(**self._options)
            try:
                await fresh.start()
            except KafkaError as error:
                log.warning("Cannot open a new producer yet: %r", error)
                await fresh.stop()
                return
            if self._producer is not broken:
                # Stopped in the meantime.
                await fresh.stop()
                return
            self._producer = fresh
        retire = asyncio.ensure_future(broken.stop())
        retire.add_done_callback(lambda task: task.cancelled() or task.exception())


async def _enqueue(
    producer: AIOKafkaProducer, topic: str, records: Sequence[Record]
) -> list[tuple[asyncio.Future[Any], list[Record]]]:
    """One batch per partition (more where it grows past the batch size), each with its future."""
    partitions = sorted(await producer.partitions_for(topic))
    by_partition: dict[int, list[Record]] = {}
    for record in records:
        # A dead letter's key is anybody's: hashing a megabyte would hold the loop, keeping it the memory.
        hashed = record.key and len(record.key) <= MAX_HASHED_BYTES and len(partitions) > 1
        place = _key_hash(record.key) % len(partitions) if record.key and hashed else 0
        by_partition.setdefault(partitions[place], []).append(record)
    batches: list[tuple[asyncio.Future[Any], list[Record]]] = []
    for partition, group in by_partition.items():
        builder = producer.create_batch()
        sent: list[Record] = []
        for record in group:
            headers = list(record.headers)
            if builder.append(key=record.key, value=record.value, timestamp=None, headers=headers) is None:
                batches.append((await producer.send_batch(builder, topic, partition=partition), sent))
                builder, sent = producer.create_batch(), []
                builder.append(key=record.key, value=record.value, timestamp=None, headers=headers)
            sent.append(record)
        batches.append((await producer.send_batch(builder, topic, partition=partition), sent))
    return batches
