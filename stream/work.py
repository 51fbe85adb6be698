"""Units of work: what the feeder hands over and the request path answers.

A record here is any object with the attributes of a Kafka record (topic, partition, offset, key,
value, headers, timestamp in ms); aiokafka's `ConsumerRecord` is one, and tests make their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


class LogRecord(Protocol):
    """The part of a Kafka record that the request path reads."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]: ...
    @property
    def timestamp(self) -> int: ...


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Records of one topic, in partition order, handed over together.

    `release` is called exactly once, when every record has its list or its dead letter in Kafka;
    a unit that is never released is read again by the next owner of its partitions.
    """

    topic: str
    epoch: int  # u32 from the topic's id, see topics.admin.topic_epoch
    records: Sequence[LogRecord]
    received_s: float  # event-loop clock
    release: Callable[[], None]
