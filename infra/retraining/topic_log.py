"""The clicks of a topic between two sets of offsets, as a log to learn from.

Both sets are fixed before anything is read, kept in the run and written into the manifest with the topic's
epoch, so that a run can be repeated exactly as long as Kafka keeps the records. Reading goes partition by
partition, in chunks of columns; no more than `max_events` records are asked for. What is no click is counted
by its reason and left out: the worker has made a dead letter of it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict

from compression.logs.dataset import Log, to_sequences
from compression.logs.log_reader import EventChunk, LogInvalid, ReadReport
from infra.clients import BrokerUnavailable, reader
from topics.admin import topic_epoch
from topics.codec import DecodeError, decode_click
from topics.messages import BEHAVIORS

CHUNK_EVENTS: Final = 20_000
_CODES: Final = {name: code for code, name in enumerate(BEHAVIORS)}
_SILENCE_S: Final = 30.0  # a broker that says nothing for so long while records are left is away


class Bounds(BaseModel):
    """Which records: [start, end) per partition of one topic. `clock_s` is when that was settled, by which a
    timestamp in the future is told."""

    model_config = ConfigDict(frozen=True)

    topic: str
    epoch: int
    start: dict[int, int]
    end: dict[int, int]
    clock_s: float

    @property
    def records(self) -> int:
        return sum(max(0, self.end[partition] - self.start[partition]) for partition in self.end)

    def newest(self, most: int) -> Bounds:
        """At most so many records, as many off the old end of each partition as its share is."""
        total = self.records
        if total <= most:
            return self
        start = {
            partition: end - max(0, end - self.start[partition]) * most // total
            for partition, end in self.end.items()
        }
        return self.model_copy(update={"start": start})


def bounds_now(bootstrap: str, topic: str, since: Bounds | None = None) -> Bounds:
    """From `since`'s ends, or from what Kafka still has, until now. `LogInvalid` where the topic is not the
    one that `since` is of: its offsets mean nothing any more."""
    epoch = topic_epoch(bootstrap, topic)
    consumer = reader(bootstrap, topic)
    try:
        partitions = sorted(consumer.assignment())
        oldest = {p.partition: int(offset) for p, offset in consumer.beginning_offsets(partitions).items()}
        end = {p.partition: int(offset) for p, offset in consumer.end_offsets(partitions).items()}
    finally:
        consumer.close()
    if since is None:
        return Bounds(topic=topic, epoch=epoch, start=oldest, end=end, clock_s=time.time())
    if since.epoch != epoch:
        raise LogInvalid(f"{topic} has been deleted and created anew since that run: use --from earliest")
    start = {number: max(first, since.end.get(number, 0)) for number, first in oldest.items()}
    return Bounds(topic=topic, epoch=epoch, start=start, end=end, clock_s=time.time())


class TopicLog:
    """A `compression.logs.sources.Source` over the records within `bounds`."""

    def __init__(self, bootstrap: str, bounds: Bounds) -> None:
        self._bootstrap = bootstrap
        self._asked = bounds
        self._read = bounds
        self._report = ReadReport()

    def read(self, max_events: int, progress: Callable[[float], None]) -> Log:
        """Every click within the bounds; older ones than fit `max_events` are not asked for."""
        self._check_topic()
        self._read = self._asked.newest(max_events)
        self._report = ReadReport()
        chunks: deque[EventChunk] = deque(self._chunks(progress))
        if not chunks:
            raise LogInvalid(
                f"{self._asked.topic} holds no click between these offsets ({self._read.records} records, "
                f"{self._report.bad_rows} of them bad): nothing to learn from"
            )
        return Log(to_sequences(chunks), self._report, self._asked.records - self._read.records)

    def provenance(self) -> dict[str, Any]:
        bounds = self._read
        return {
            "log": f"topic {bounds.topic}",
            "topic": bounds.topic,
            "topic_epoch": bounds.epoch,
            "start_offsets": {str(number): offset for number, offset in bounds.start.items()},
            "end_offsets": {str(number): offset for number, offset in bounds.end.items()},
            "clock_s": bounds.clock_s,
        }

    def _check_topic(self) -> None:
        found = topic_epoch(self._bootstrap, self._asked.topic)
        if found != self._asked.epoch:
            raise LogInvalid(
                f"{self._asked.topic} is another topic than the one these offsets are of "
                f"(epoch {found}, not {self._asked.epoch}): it was deleted and created anew"
            )

    def _chunks(self, progress: Callable[[float], None]) -> Iterator[EventChunk]:
        columns: tuple[list[int], ...] = ([], [], [], [], [], [])
        total, seen = max(1, self._read.records), 0
        for record in self._records():
            seen += 1
            try:
                click = decode_click(record.key, record.value, record.headers or (), now_s=self._read.clock_s)
            except DecodeError as error:
                self._report.bad_rows += 1
                self._report.reasons[error.reason] = self._report.reasons.get(error.reason, 0) + 1
                continue
            event = (
                click.user_id,
                click.item_id,
                click.category_id,
                _CODES[click.behavior],
                click.timestamp,
                record.offset,
            )
            for column, value in zip(columns, event, strict=True):
                column.append(value)
            if len(columns[0]) == CHUNK_EVENTS:
                yield self._chunk(columns)
                columns = ([], [], [], [], [], [])
                progress(min(1.0, seen / total))
        if columns[0]:
            yield self._chunk(columns)

    def _chunk(self, columns: tuple[list[int], ...]) -> EventChunk:
        self._report.rows += len(columns[0])
        return EventChunk(*(np.array(column, np.int64) for column in columns))

    def _records(self) -> Iterator[Any]:
        """One partition after the other, so that the same bounds give the same order."""
        from kafka import TopicPartition

        bounds = self._read
        consumer = reader(self._bootstrap, bounds.topic, max_poll_records=5_000)
        try:
            for number, end in sorted(bounds.end.items()):
                partition = TopicPartition(bounds.topic, number)
                if bounds.start[number] >= end:
                    continue
                consumer.assign([partition])
                oldest = consumer.beginning_offsets([partition])[partition]
                if oldest > bounds.start[number]:
                    raise LogInvalid(
                        f"{bounds.topic}-{number} begins at {oldest} by now: the records from "
                        f"{bounds.start[number]} on have passed their retention"
                    )
                consumer.seek(partition, bounds.start[number])
                yield from self._until(consumer, partition, end)
        finally:
            consumer.close()

    def _until(self, consumer: Any, partition: Any, end: int) -> Iterator[Any]:
        heard_s = time.monotonic()
        while consumer.position(partition) < end:
            polled = consumer.poll(timeout_ms=500)
            for record in polled.get(partition, ()):
                if record.offset < end:
                    yield record
            if polled:
                heard_s = time.monotonic()
            elif time.monotonic() - heard_s > _SILENCE_S:
                raise BrokerUnavailable(f"{partition.topic}-{partition.partition}: Kafka has fallen silent")
