"""kafka-python clients for the command line: producers, consumers, and where a user's records lie."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError
from kafka.partitioner.default import murmur2

from topics.admin import check_listens
from topics.codec import record_key

REQUEST_TIMEOUT_MS = 15_000
DELIVERY_TIMEOUT_S = 60.0


class BrokerUnavailable(ConnectionError):
    """No broker answered; the message names the address and what to do."""


def producer(bootstrap: str, **options: Any) -> KafkaProducer:
    """An idempotent producer that waits for all replicas. A `ConnectionError` where no broker answers."""
    # kafka-python asks a port that refuses again until its timeout.
    check_listens(bootstrap)
    try:
        return KafkaProducer(
            bootstrap_servers=bootstrap,
            bootstrap_timeout_ms=REQUEST_TIMEOUT_MS,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
            # For a topic's whereabouts; a minute otherwise.
            max_block_ms=REQUEST_TIMEOUT_MS,
            **{"linger_ms": 5, **options},
        )
    except KafkaError as error:
        raise _unavailable(bootstrap, error) from error


class Outgoing:
    """Records on their way through a producer, at most `most` of them unacknowledged: kafka-python
    bounds nothing itself. A record that is not taken is `BrokerUnavailable`."""

    def __init__(self, client: Any, most: int = 10_000, *, timeout_s: float = DELIVERY_TIMEOUT_S) -> None:
        self._client = client
        self._most = most
        self._timeout_s = timeout_s
        self._unsent: deque[Any] = deque()

    def send(
        self,
        topic: str,
        *,
        key: bytes | None,
        value: bytes | None,
        headers: Sequence[tuple[str, bytes | None]] = (),
    ) -> None:
        try:
            self._unsent.append(self._client.send(topic, key=key, value=value, headers=list(headers)))
        except KafkaError as error:
            raise _not_taken(topic, error) from error
        if len(self._unsent) >= self._most:
            self._await_oldest()

    def finish(self) -> None:
        """Return when all are acknowledged."""
        while self._unsent:
            self._await_oldest()

    def _await_oldest(self) -> None:
        try:
            self._unsent.popleft().get(timeout=self._timeout_s)
        except KafkaError as error:
            raise _not_taken("the topic", error) from error


def reader(bootstrap: str, topic: str, **options: Any) -> KafkaConsumer:
    """A consumer that joins no group, assigned to all partitions of a topic. A `ConnectionError` where no
    broker answers or the topic is not there."""
    check_listens(bootstrap)
    try:
        consumer = KafkaConsumer(
            bootstrap_servers=bootstrap,
            bootstrap_timeout_ms=REQUEST_TIMEOUT_MS,
            **{"group_id": None, **options},
        )
        known = consumer.partitions_for_topic(topic)
    except KafkaError as error:
        raise _unavailable(bootstrap, error) from error
    if not known:
        consumer.close()
        raise BrokerUnavailable(f"no topic {topic!r} at {bootstrap}; `tailrace up` creates the topics")
    consumer.assign([TopicPartition(topic, number) for number in sorted(known)])
    return consumer


def lag(bootstrap: str, topic: str, group: str) -> int:
    """How many records of a topic a group has not committed. It is asked about, not joined."""
    consumer = reader(bootstrap, topic, group_id=group, enable_auto_commit=False)
    try:
        ends = consumer.end_offsets(list(consumer.assignment()))
        return sum(end - (consumer.committed(partition) or 0) for partition, end in ends.items())
    finally:
        consumer.close()


def partition_of(consumer: KafkaConsumer, topic: str, user_id: int) -> int:
    """Where a user's records are: murmur2 of the key, as Java and aiokafka have it."""
    return int((murmur2(record_key(user_id)) & 0x7FFFFFFF) % len(consumer.partitions_for_topic(topic)))


def to_the_end(consumer: KafkaConsumer) -> dict[TopicPartition, int]:
    """Place the consumer after what is there now; the offsets."""
    ends: dict[TopicPartition, int] = consumer.end_offsets(list(consumer.assignment()))
    for partition, offset in ends.items():
        consumer.seek(partition, offset)
    return ends


def everything(consumer: KafkaConsumer) -> Iterator[Any]:
    """Every record that is there when asked, oldest first per partition; ends when they are read."""
    yield from everything_since(consumer, {})


def everything_since(consumer: KafkaConsumer, offsets: Mapping[TopicPartition, int]) -> Iterator[Any]:
    """The same from these offsets on; a partition that is not named is read whole."""
    left = consumer.end_offsets(list(consumer.assignment()))
    begin = {**consumer.beginning_offsets(list(left)), **offsets}
    left = {partition: end for partition, end in left.items() if end > begin[partition]}
    for partition in left:
        consumer.seek(partition, begin[partition])
    while left:
        for records in consumer.poll(timeout_ms=500).values():
            yield from records
        left = {partition: end for partition, end in left.items() if consumer.position(partition) < end}


def _not_taken(topic: str, error: KafkaError) -> BrokerUnavailable:
    return BrokerUnavailable(f"the broker did not take a record for {topic}: {error!r}")


def _unavailable(bootstrap: str, error: KafkaError) -> BrokerUnavailable:
    return BrokerUnavailable(
        f"no Kafka broker answers at {bootstrap} ({type(error).__name__}); `tailrace up` starts one here"
    )
