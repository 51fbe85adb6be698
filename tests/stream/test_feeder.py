"""The feeder against a consumer of our own: what is committed, when, and what an outage does to it."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import CorruptRecordException, KafkaError

from stream import feeder as feeder_module
from stream.feeder import Feeder, OffsetsWentBack
from stream.metrics import StreamMetrics
from stream.settings import StreamSettings
from tests.stream.worlds import LogLine
from tests.support import eventually_async

ONE, TWO = TopicPartition("clicks", 0), TopicPartition("clicks", 1)


class FakeConsumer:
    """What the feeder asks of aiokafka. Batches are given; a broker that is away holds commits up."""

    def __init__(self) -> None:
        self.given: deque = deque()
        self.commits: list[dict] = []
        self.highwaters: dict[TopicPartition, int] = {}
        self.broker = asyncio.Event()
        self.broker.set()
        self.records = asyncio.Event()
        self.records.set()
        self.polls = 0

    async def start(self) -> None: ...

    async def stop(self) -> None:
        await self.broker.wait()

    def subscribe(self, topics, listener) -> None:
        self.listener = listener

    def assignment(self) -> set[TopicPartition]:
        return set(self.highwaters)

    def highwater(self, partition) -> int:
        return self.highwaters[partition]

    async def getmany(self, *, timeout_ms, max_records):
        self.polls += 1
        await asyncio.sleep(0)
        await self.records.wait()
        answer = self.given.popleft() if self.given else {}
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def commit(self, offsets) -> None:
        await self.broker.wait()
        self.commits.append(dict(offsets))

    def give(self, partition, *offsets) -> None:
        self.highwaters[partition] = offsets[-1] + 1
        self.given.append({partition: [line(partition, offset) for offset in offsets]})


def line(partition: TopicPartition, offset: int) -> LogLine:
    return LogLine(partition.topic, partition.partition, offset, b"1", b"{}")


class Tap:
    """A feeder that runs, with what it handed over in `units`."""

    def __init__(self, **settings) -> None:
        self.consumer = FakeConsumer()
        self.metrics = StreamMetrics()
        self.units: list = []
        self.feeder = Feeder(
            settings=StreamSettings(instance_id="test", **{"drain_timeout_ms": 200, **settings}),
            epochs=defaultdict(int),
            hand_over={"clicks": self._take},
            metrics=self.metrics,
            consumer=self.consumer,
        )

    async def _take(self, unit) -> None:
        self.units.append(unit)

    async def __aenter__(self) -> Tap:
        await self.feeder.start()
        await self.rebalance()
        self.running = asyncio.ensure_future(self.feeder.run())
        return self

    async def __aexit__(self, *_) -> None:
        self.running.cancel()
        await asyncio.wait([self.running])

    async def rebalance(self) -> None:
        await self.consumer.listener.on_partitions_revoked({ONE, TWO})
        await self.consumer.listener.on_partitions_assigned({ONE, TWO})

    async def handed(self, units: int) -> list:
        await eventually_async(lambda: len(self.units) >= units)
        return self.units


async def test_what_is_committed_never_passes_a_unit_in_hand():
    async with Tap() as tap:
        tap.consumer.give(ONE, 0, 1)
        tap.consumer.give(ONE, 2, 3)
        first, second = await tap.handed(2)
        second.release()
        await tap.feeder.commit()
        assert tap.consumer.commits == []
        first.release()
        await tap.feeder.commit()
        assert tap.consumer.commits == [{ONE: 4}]


async def test_a_unit_that_outlives_its_assignment_commits_nothing_for_the_next():
    async with Tap() as tap:
        tap.consumer.give(ONE, 0, 1)
        (before,) = await tap.handed(1)
        await tap.rebalance()
        tap.consumer.give(ONE, 0, 1)
        tap.consumer.give(ONE, 2, 3)
        _, again, later = await tap.handed(3)
        before.release()
        later.release()
        await tap.feeder.commit()
        assert tap.consumer.commits == []
        again.release()
        await tap.feeder.commit()
        assert tap.consumer.commits == [{ONE: 4}]


async def test_a_rebalance_waits_for_what_is_in_hand_and_commits_it():
    async with Tap(drain_timeout_ms=5_000) as tap:
        tap.consumer.give(ONE, 0, 1)
        (unit,) = await tap.handed(1)
        rebalancing = asyncio.ensure_future(tap.rebalance())
        await asyncio.sleep(0)
        assert not rebalancing.done()
        unit.release()
        await rebalancing
        assert tap.consumer.commits == [{ONE: 2}]


async def test_draining_ends_though_the_broker_never_answers(monkeypatch):
    monkeypatch.setattr(feeder_module, "COMMIT_TIMEOUT_S", 0.05)
    monkeypatch.setattr(feeder_module, "STOP_TIMEOUT_S", 0.05)
    async with Tap() as tap:
        tap.consumer.give(ONE, 0)
        (unit,) = await tap.handed(1)
        unit.release()
        tap.consumer.broker.clear()
        assert await asyncio.wait_for(tap.feeder.drain(), 10.0)
        await asyncio.wait_for(tap.feeder.stop(), 10.0)
        tap.consumer.broker.set()


async def test_a_commit_under_way_ends_before_partitions_are_given_up():
    async with Tap() as tap:
        tap.consumer.give(ONE, 0)
        (unit,) = await tap.handed(1)
        unit.release()
        tap.consumer.broker.clear()
        committing = asyncio.ensure_future(tap.feeder.commit())
        rebalancing = asyncio.ensure_future(tap.rebalance())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not rebalancing.done()
        tap.consumer.broker.set()
        await rebalancing
        assert committing.done()
        assert tap.consumer.commits == [{ONE: 1}]


async def test_records_polled_after_the_drain_began_are_left_for_the_next_owner():
    async with Tap() as tap:
        tap.consumer.records.clear()
        polls = tap.consumer.polls
        await eventually_async(lambda: tap.consumer.polls > polls)
        await tap.feeder.drain()
        tap.consumer.give(ONE, 0)
        tap.consumer.records.set()
        await asyncio.wait_for(tap.running, 10.0)
        assert tap.units == []
        assert tap.feeder.in_flight == 0


async def test_an_error_of_the_coordination_is_outlived(monkeypatch):
    monkeypatch.setattr(feeder_module, "ERROR_BACKOFF_S", 0.0)
    async with Tap() as tap:
        tap.consumer.given.append(KafkaError("the coordinator is loading"))
        tap.consumer.give(ONE, 0)
        assert len(await tap.handed(1)) == 1


async def test_an_error_that_stays_ends_the_worker(monkeypatch):
    monkeypatch.setattr(feeder_module, "ERROR_BACKOFF_S", 0.0)
    monkeypatch.setattr(feeder_module, "ERRORS_FOR_S", 0.01)
    async with Tap() as tap:
        tap.consumer.given.extend(KafkaError("not authorized") for _ in range(100_000))
        with pytest.raises(KafkaError):
            await asyncio.wait_for(tap.running, 10.0)


async def test_an_error_that_may_have_taken_records_with_it_ends_the_worker():
    async with Tap() as tap:
        tap.consumer.given.append(CorruptRecordException("crc"))
        tap.consumer.give(ONE, 0)
        with pytest.raises(CorruptRecordException):
            await asyncio.wait_for(tap.running, 10.0)


async def test_a_topic_made_anew_ends_the_worker_because_its_epoch_is_another():
    async with Tap() as tap:
        tap.consumer.give(ONE, 7, 8)
        (unit,) = await tap.handed(1)
        unit.release()
        await tap.feeder.commit()
        await tap.rebalance()
        tap.consumer.give(ONE, 0)
        with pytest.raises(OffsetsWentBack, match="clicks/0 is at 0 again after 9"):
            await asyncio.wait_for(tap.running, 10.0)


async def test_a_unit_that_is_stuck_shows_though_others_are_answered():
    async with Tap() as tap:
        tap.consumer.give(ONE, 0)
        (stuck,) = await tap.handed(1)
        received_s = asyncio.get_running_loop().time()
        await asyncio.sleep(0.05)
        tap.consumer.give(TWO, 0)
        _, other = await tap.handed(2)
        other.release()
        assert tap.feeder.stalled_s() >= asyncio.get_running_loop().time() - received_s
        stuck.release()
        assert tap.feeder.stalled_s() == 0.0


async def test_waiting_for_an_assignment_is_a_stall_and_not_readiness():
    async with Tap() as tap:
        assert tap.feeder.assigned.is_set()
        await tap.consumer.listener.on_partitions_revoked({ONE})
        await asyncio.sleep(0.01)
        assert tap.feeder.stalled_s() > 0
        assert not tap.feeder.assigned.is_set()
        await tap.consumer.listener.on_partitions_assigned(set())
        assert tap.feeder.stalled_s() == 0.0
        assert tap.feeder.assigned.is_set()


async def test_an_idle_worker_is_not_stalled_the_moment_a_record_shows():
    async with Tap() as tap:
        tap.consumer.give(ONE, 0)
        (unit,) = await tap.handed(1)
        unit.release()
        await asyncio.sleep(0.05)
        tap.consumer.highwaters[ONE] = 2
        assert tap.feeder.stalled_s() < 0.05


async def test_the_lag_of_partitions_given_up_is_not_reported_any_more():
    async with Tap(commit_interval_ms=10) as tap:
        tap.consumer.give(ONE, 0)
        await tap.handed(1)
        tap.consumer.highwaters[ONE] = 50
        reporting = asyncio.ensure_future(tap.feeder.commit_periodically())

        def lag() -> float | None:
            return tap.metrics.registry.get_sample_value(
                "tailrace_lag", {"topic": "clicks", "partition": "0"}
            )

        await eventually_async(lambda: lag() == 49)
        reporting.cancel()
        await tap.consumer.listener.on_partitions_revoked({ONE})
        assert lag() is None


async def test_polling_stops_at_the_bound_of_records_in_hand():
    async with Tap(max_in_flight=4) as tap:
        for first in range(0, 20, 2):
            tap.consumer.give(ONE, first, first + 1)
        await tap.handed(2)
        polls = tap.consumer.polls
        for _ in range(10):
            await asyncio.sleep(0)
        assert (tap.consumer.polls, len(tap.units)) == (polls, 2)
        tap.units[0].release()
        await tap.handed(3)


async def test_with_a_unit_for_every_processor_the_next_is_polled_when_one_is_answered():
    async with Tap(gather_units=2, gather_ms=60_000) as tap:
        for offset in range(3):
            tap.consumer.give(ONE, offset)
        first, _ = await tap.handed(2)
        polls = tap.consumer.polls
        for _ in range(50):
            await asyncio.sleep(0)
        assert (tap.consumer.polls, len(tap.units)) == (polls, 2)
        first.release()
        assert len(await tap.handed(3)) == 3


async def test_units_that_hang_do_not_keep_the_next_from_being_polled():
    async with Tap(gather_units=1, gather_ms=1) as tap:
        for offset in range(5):
            tap.consumer.give(ONE, offset)
        assert len(await tap.handed(5)) == 5


async def test_partitions_that_come_and_go_raise_the_question_of_a_second_worker_of_that_name(caplog):
    async with Tap() as tap:
        for _ in range(3):
            await tap.rebalance()
        assert "does another worker run as" not in caplog.text
        await tap.rebalance()
    assert "does another worker run as 'test'" in caplog.text
