"""Where records go among partitions, and what a producer that broke is replaced by."""

from __future__ import annotations

import asyncio

from aiokafka.errors import KafkaConnectionError, OutOfOrderSequenceNumber

from stream import delivery as delivery_module
from stream.delivery import Backoff, Delivery, Record


class FakeBatch:
    def __init__(self) -> None:
        self.records: list = []

    def append(self, **record):
        self.records.append(record)
        return object()


class FakeProducer:
    """Takes all, or refuses with `refusal`; `opening` is what `start` raises or waits for."""

    partitions = (0, 1, 2, 3)

    def __init__(self, refusal: Exception | None = None, opening: Exception | None = None) -> None:
        self.refusal = refusal
        self.opening = opening
        self.started = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()
        self.stopped = False
        self.sent: list[tuple[int, bytes | None]] = []

    async def start(self) -> None:
        self.started.set()
        await self.go.wait()
        if self.opening is not None:
            raise self.opening

    async def stop(self) -> None:
        self.stopped = True

    async def partitions_for(self, topic):
        return set(self.partitions)

    def create_batch(self):
        return FakeBatch()

    async def send_batch(self, batch, topic, *, partition):
        done = asyncio.get_running_loop().create_future()
        if self.refusal is not None:
            done.set_exception(self.refusal)
        else:
            self.sent += [(partition, record["key"]) for record in batch.records]
            done.set_result(None)
        return done


async def opened(monkeypatch, *producers: FakeProducer) -> Delivery:
    """A delivery that opens these producers one after the other."""
    waiting = iter(producers)
    monkeypatch.setattr(delivery_module, "AIOKafkaProducer", lambda **_: next(waiting))
    delivery = Delivery("broker", Backoff(0.001, 0.001))
    await delivery.start()
    return delivery


async def test_a_key_of_a_megabyte_is_neither_hashed_nor_kept(monkeypatch):
    hashed: list[bytes] = []
    monkeypatch.setattr(delivery_module, "_key_hash", lambda key: hashed.append(key) or 3)
    producer = FakeProducer()
    delivery = await opened(monkeypatch, producer)
    await delivery.send("letters", [Record(b"7", b""), Record(b"k" * 2**20, b""), Record(None, b"")])
    assert hashed == [b"7"]
    assert sorted(partition for partition, _ in producer.sent) == [0, 0, 3]


async def test_a_producer_whose_sequence_is_refused_is_replaced(monkeypatch):
    broken, fresh = FakeProducer(OutOfOrderSequenceNumber()), FakeProducer()
    delivery = await opened(monkeypatch, broken, fresh)
    await delivery.send("lists", [Record(b"7", b"")])
    assert [key for _, key in fresh.sent] == [b"7"]
    await asyncio.sleep(0)
    assert broken.stopped


async def test_a_producer_that_cannot_be_opened_is_closed_and_another_is_tried(monkeypatch):
    broken = FakeProducer(OutOfOrderSequenceNumber())
    nowhere = FakeProducer(opening=KafkaConnectionError("no broker"))
    fresh = FakeProducer()
    delivery = await opened(monkeypatch, broken, nowhere, fresh)
    await delivery.send("lists", [Record(b"7", b"")])
    assert nowhere.stopped
    assert len(fresh.sent) == 1


async def test_a_producer_opened_while_the_worker_stops_is_closed_again(monkeypatch):
    broken, fresh = FakeProducer(OutOfOrderSequenceNumber()), FakeProducer()
    fresh.go.clear()
    delivery = await opened(monkeypatch, broken, fresh)
    sending = asyncio.ensure_future(delivery.send("lists", [Record(b"7", b"")]))
    await fresh.started.wait()
    await delivery.stop()
    fresh.go.set()
    await asyncio.wait([sending])
    assert sending.cancelled()
    assert fresh.stopped
    assert fresh.sent == []
