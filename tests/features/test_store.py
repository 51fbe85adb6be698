"""One suite for both feature stores; the Redis one runs on a real server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features import keys
from features.memory_store import MemoryStore
from features.redis_store import RedisStore
from features.sequence import FENCE_BYTES, HEADER_BYTES, MAX_EVENTS, NARROW, WIDE, unpack
from features.settings import FeatureSettings
from features.store import Append, FeatureStore, log2_add
from tests.support import eventually_async

MAX_ID = 2**63 - 1
AGE_S = 1000
SETTINGS = FeatureSettings(store_timeout_ms=5_000, sequence_max_age_s=AGE_S, sequence_ttl_s=50)


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[FeatureStore]:
    if request.param == "memory":
        yield MemoryStore(settings=SETTINGS)
        return
    made = RedisStore(request.getfixturevalue("redis_url"), settings=SETTINGS)
    yield made
    await made.close()


@pytest.fixture
async def redis_store(redis_url: str) -> AsyncIterator[RedisStore]:
    made = RedisStore(redis_url, settings=SETTINGS)
    yield made
    await made.close()


def event(offset: int, **changes: int) -> Append:
    fields = {
        "user_id": 1,
        "item_id": 1000 + offset,
        "category_id": 7,
        "behavior": 0,
        "timestamp": 1_511_539_200 + offset,
        "epoch": 5,
        "partition": 0,
        "offset": offset,
    }
    return Append(**(fields | changes))


class Event(NamedTuple):
    item: int
    category: int
    behavior: int
    timestamp: int


def events_of(value: bytes | None) -> list[Event]:
    batch = unpack([value])
    columns = (batch.items, batch.categories, batch.behaviors, batch.timestamps)
    return [Event(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def items_of(value: bytes | None) -> list[int]:
    return [event.item for event in events_of(value)]


async def value_of(store: FeatureStore, user: int = 1) -> bytes | None:
    (value,) = await store.read([user])
    return value.sequence


async def values_of(store: FeatureStore, users: Sequence[int]) -> list[bytes | None]:
    return [user.sequence for user in await store.read(users)]


class Oracle:
    """The rules of a sequence, as plainly as they can be said."""

    def __init__(self) -> None:
        self.events: dict[int, list[Event]] = {}
        self.fences: dict[tuple[int, int], tuple[int, int]] = {}

    def append(self, given: Append) -> bool:
        epoch, offset = self.fences.get((given.user_id, given.partition), (given.epoch, -1))
        if epoch == given.epoch and given.offset <= offset:
            return False
        self.fences[given.user_id, given.partition] = (given.epoch, given.offset)
        kept = self.events.setdefault(given.user_id, [])
        kept.append(Event(given.item_id, given.category_id, given.behavior, given.timestamp))
        del kept[:-MAX_EVENTS]
        while kept[0].timestamp < given.timestamp - AGE_S:
            del kept[0]
        return True


async def test_an_answer_holds_the_sequence_just_after_its_own_event(store: FeatureStore) -> None:
    answers, _ = await store.append([event(0), event(1), event(2, user_id=2), event(3)])
    assert [items_of(answer.sequence) for answer in answers] == [
        [1000],
        [1000, 1001],
        [1002],
        [1000, 1001, 1003],
    ]
    assert all(answer.applied for answer in answers)


async def test_every_field_survives(store: FeatureStore) -> None:
    await store.append([event(0, item_id=2**32 - 1, category_id=2**30 - 1, behavior=3, timestamp=2**32 - 1)])
    value = await value_of(store)
    assert value is not None and value[0] == NARROW
    assert events_of(value) == [Event(2**32 - 1, 2**30 - 1, 3, 2**32 - 1)]


async def test_a_user_without_history_reads_as_none_in_its_place(store: FeatureStore) -> None:
    await store.append([event(0, user_id=0), event(1, user_id=MAX_ID)])
    values = await values_of(store, [5, MAX_ID, 6, 0])
    assert [items_of(value) for value in values] == [[], [1001], [], [1000]]
    assert values[0] is None and values[2] is None


async def test_no_users_and_no_events_are_no_work(store: FeatureStore) -> None:
    assert await store.append([]) == ([], [])
    assert await store.read([]) == []
    assert await store.neighbours([], 5) == []
    await store.increment({})


async def test_a_duplicate_changes_nothing_and_answers_the_sequence_as_it_stands(
    store: FeatureStore,
) -> None:
    await store.append([event(0), event(1)])
    before = await value_of(store)
    answers, _ = await store.append([event(0, item_id=99), event(1), event(1)])
    assert [answer.applied for answer in answers] == [False, False, False]
    assert {answer.sequence for answer in answers} == {before}
    assert await value_of(store) == before


async def test_a_duplicate_inside_its_own_batch_counts_once(store: FeatureStore) -> None:
    answers, _ = await store.append([event(0), event(0), event(1), event(0)])
    assert [answer.applied for answer in answers] == [True, False, True, False]
    assert items_of(answers[3].sequence) == [1000, 1001]


async def test_replay_from_any_earlier_offset_leaves_the_same_bytes(store: FeatureStore) -> None:
    log = [event(offset, user_id=offset % 3) for offset in range(130)]
    await store.append(log)
    before = await store.read(range(3))
    for start in (0, 1, 64, 128, 129):
        answers, _ = await store.append(log[start:])
        assert not any(answer.applied for answer in answers)
        assert await store.read(range(3)) == before


async def test_each_partition_has_a_fence_of_its_own(store: FeatureStore) -> None:
    await store.append([event(50, partition=3), event(7, partition=1), event(9, partition=1)])
    answers, _ = await store.append(
        [event(8, partition=1), event(50, partition=3), event(51, partition=3), event(0, partition=2)]
    )
    assert [answer.applied for answer in answers] == [False, False, True, True]
    value = await value_of(store)
    assert value is not None and value[1] == 3
    assert items_of(value) == [1050, 1007, 1009, 1051, 1000]


async def test_a_recreated_topic_starts_its_offsets_anew(store: FeatureStore) -> None:
    await store.append([event(500, epoch=5), event(2, epoch=5, partition=1)])
    answers, _ = await store.append([event(0, epoch=6), event(0, epoch=6), event(1, epoch=6)])
    assert [answer.applied for answer in answers] == [True, False, True]
    value = await value_of(store)
    assert value is not None and value[1] == 2
    assert items_of(value) == [1500, 1002, 1000, 1001]


async def test_offsets_past_32_bits_are_told_apart(store: FeatureStore) -> None:
    high = 2**52
    log = [event(high + at, item_id=at, timestamp=1_511_539_200) for at in (0, 1, 1)]
    answers, _ = await store.append(log)
    assert [answer.applied for answer in answers] == [True, True, False]


async def test_only_the_newest_hundred_stay(store: FeatureStore) -> None:
    answers, _ = await store.append([event(offset) for offset in range(90)])
    answers, _ = await store.append([event(offset) for offset in range(90, 257)])
    assert items_of(answers[9].sequence) == list(range(1000, 1100))
    assert items_of(answers[-1].sequence) == list(range(1157, 1257))
    value = await value_of(store)
    assert value is not None and len(value) == HEADER_BYTES + FENCE_BYTES + 12 * MAX_EVENTS


async def test_a_smaller_cap_shortens_what_is_there(redis_url: str) -> None:
    small = SETTINGS.model_copy(update={"sequence_events": 3})
    before, after = RedisStore(redis_url, settings=SETTINGS), RedisStore(redis_url, settings=small)
    await before.append([event(offset) for offset in range(10)])
    answers, _ = await after.append([event(10)])
    assert items_of(answers[0].sequence) == [1008, 1009, 1010]
    await before.close()
    await after.close()


async def test_events_too_old_for_the_newest_one_are_dropped_from_the_front(store: FeatureStore) -> None:
    start_s = 1_511_539_200
    seconds = [0, 10, AGE_S, 20, AGE_S + 10]
    await store.append([event(at, timestamp=start_s + s) for at, s in enumerate(seconds)])
    # The first is 10 s too old. The one of second 20 would be too old later, but is not at the front.
    assert [e.timestamp - start_s for e in events_of(await value_of(store))] == [10, AGE_S, 20, AGE_S + 10]
    await store.append([event(9, timestamp=start_s + 5 * AGE_S)])
    assert [e.timestamp - start_s for e in events_of(await value_of(store))] == [5 * AGE_S]


async def test_an_event_late_by_more_than_the_age_drops_nothing(store: FeatureStore) -> None:
    await store.append([event(0), event(1, timestamp=1)])
    assert len(events_of(await value_of(store))) == 2


@pytest.mark.parametrize("huge", [{"item_id": 2**32}, {"category_id": 2**30}, {"item_id": MAX_ID}])
async def test_an_id_that_does_not_fit_widens_the_sequence_and_it_stays_exact(
    store: FeatureStore, huge: dict[str, int]
) -> None:
    narrow = [event(at, item_id=2**32 - 1 - at, category_id=2**30 - 1 - at, behavior=at) for at in range(4)]
    wide = event(4, **({"category_id": MAX_ID - 1, "behavior": 2} | huge))
    after = event(5, item_id=2**32 - 9, category_id=2**30 - 9, behavior=3)
    answers, _ = await store.append([*narrow, wide, after])
    assert [answer.sequence[0] for answer in answers] == [NARROW] * 4 + [WIDE] * 2
    expected = [Event(e.item_id, e.category_id, e.behavior, e.timestamp) for e in [*narrow, wide, after]]
    assert events_of(await value_of(store)) == expected
    again, _ = await store.append([wide])
    assert not again[0].applied
    assert events_of(await value_of(store)) == expected


async def test_a_full_narrow_sequence_widens_and_keeps_its_cap(store: FeatureStore) -> None:
    await store.append([event(at) for at in range(150)])
    await store.append([event(at, item_id=MAX_ID - at) for at in range(150, 153)])
    await store.append([event(at) for at in range(153, 155)])
    expected = [*range(1053, 1150), *(MAX_ID - at for at in range(150, 153)), 1153, 1154][-100:]
    assert items_of(await value_of(store)) == expected


async def test_neighbours_come_with_the_append_heaviest_first(store: FeatureStore) -> None:
    name, other = keys.transitions(MAX_ID), keys.category(3)
    await store.increment({name: {1: 4.0, MAX_ID: 6.0, 0: 5.0}, other: {8: -2.5}})
    answers, read = await store.append([event(0)], neighbours=[name, keys.transitions(4), other], limit=2)
    assert answers[0].applied
    assert [n.items.tolist() for n in read] == [[MAX_ID, 0], [], [8]]
    assert [n.log2_weights.tolist() for n in read] == [[6.0, 5.0], [], [-2.5]]


async def test_increments_add_up_however_large_the_logarithms(store: FeatureStore) -> None:
    far = 2_000_000.0  # a half-life of fifteen minutes, today
    name = keys.category(1)
    await store.increment({name: {1: far, 2: far + 1}})
    await store.increment({name: {1: far}})
    await store.increment({name: {1: far + 1, 3: 0.0}})
    (read,) = await store.neighbours([name], 10)
    assert read.items.tolist() == [1, 2, 3]
    assert read.log2_weights.tolist() == pytest.approx([far + 2, far + 1, 0.0], abs=1e-6)


async def test_equal_weights_come_in_the_same_order_from_every_store(
    redis_store: RedisStore,
) -> None:
    name = keys.category(1)
    same = {random.Random(3).randrange(2**63) >> at: 1.0 for at in range(60)}
    twin = MemoryStore(settings=SETTINGS)
    for each in (redis_store, twin):
        await each.increment({name: same})
    ((a,), (b,)) = (await redis_store.neighbours([name], 50), await twin.neighbours([name], 50))
    assert a.items.tolist() == b.items.tolist()


@pytest.mark.parametrize("name", [keys.transitions(1), keys.category(1), keys.POPULAR])
async def test_a_statistic_keeps_its_heaviest_members_only(store: FeatureStore, name: str) -> None:
    most = keys.bound(name).members
    await store.increment({name: {item: float(item) for item in range(most + 700)}})
    (read,) = await store.neighbours([name], most + 1000)
    assert read.items.tolist() == list(range(most + 699, 699, -1))


async def test_in_memory_sequences_expire_and_applied_events_renew_them() -> None:
    now_s = 0.0
    store = MemoryStore(settings=SETTINGS, clock=lambda: now_s)
    await store.append([event(0)])
    now_s = 40.0
    await store.append([event(1)])
    now_s = 89.0
    assert items_of(await value_of(store)) == [1000, 1001]
    await store.append([event(1)])  # a duplicate renews nothing
    now_s = 90.0
    assert await value_of(store) is None
    answers, _ = await store.append([event(0)])
    assert answers[0].applied


async def test_in_redis_sequences_expire_and_applied_events_renew_them(
    redis_store: RedisStore, redis_url: str
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        await redis_store.append([event(0)])
        key = keys.sequence(1)
        assert 49_000 < client.pttl(key) <= 50_000
        client.pexpire(key, 10_000)
        await redis_store.append([event(0)])  # a duplicate renews nothing
        assert client.pttl(key) <= 10_000
        await redis_store.append([event(1)])
        assert client.pttl(key) > 49_000
        await redis_store.increment({keys.POPULAR: {1: 1.0}})
        assert client.ttl(keys.POPULAR) > keys.bound(keys.POPULAR).ttl_s - 5
        client.pexpire(key, 1)

        async def gone() -> bool:
            return await value_of(redis_store) is None

        await eventually_async(gone)


async def test_a_users_tier_comes_with_every_append_and_every_read(store: FeatureStore) -> None:
    await store.set_tier(2, "premium")
    await store.set_tier(MAX_ID, "free")
    batch = [event(0), event(1, user_id=2), event(2, user_id=2), event(3, user_id=MAX_ID)]
    for _ in range(2):  # a duplicate tells it too
        answers, _ = await store.append(batch)
        assert [answer.tier for answer in answers] == [None, "premium", "premium", "free"]
    assert [user.tier for user in await store.read([MAX_ID, 1, 2, 9])] == ["free", None, "premium", None]
    assert await store.tiers([MAX_ID, 1, 2, 9]) == ["free", None, "premium", None]
    assert await store.tiers([]) == []
    assert items_of(await value_of(store, 2)) == [1001, 1002]


async def test_a_tier_changes_with_the_next_click_and_can_be_taken_away(store: FeatureStore) -> None:
    tiers = []
    for offset, tier in enumerate(["free", "premium", "premium", None, None]):
        await store.set_tier(1, tier)
        answers, _ = await store.append([event(offset)])
        tiers.append(answers[0].tier)
    assert tiers == ["free", "premium", "premium", None, None]


async def test_a_tier_has_no_lifetime_and_needs_no_history(redis_store: RedisStore, redis_url: str) -> None:
    await redis_store.set_tier(1, "premium")
    assert await redis_store.read([1]) == [(None, "premium")]
    with redis.Redis.from_url(redis_url) as client:
        assert client.pttl(keys.tier(1)) == -1


@pytest.mark.parametrize("kind", ["a list", "bytes that are no text"])
async def test_a_tier_that_is_none_of_ours_holds_nothing_up(
    redis_store: RedisStore, redis_url: str, kind: str
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        if kind == "a list":
            client.lpush(keys.tier(1), "premium")
        else:
            client.set(keys.tier(1), b"\xff\x00")
    answers, _ = await redis_store.append([event(0), event(1)])
    assert [answer.applied for answer in answers] == [True, True]
    assert items_of(await value_of(redis_store)) == [1000, 1001]
    assert answers[0].tier in (None, "\ufffd\x00")


async def test_a_batch_is_one_round_trip(redis_store: RedisStore, redis_url: str) -> None:
    await redis_store.append([event(0)])
    with redis.Redis.from_url(redis_url) as client:
        client.config_resetstat()
        batch = [event(at, user_id=at % 40) for at in range(1, 200)]
        await redis_store.append(batch, neighbours=[keys.POPULAR, keys.category(1)])
        calls = {name: stat["calls"] for name, stat in client.info("commandstats").items()}
        reads = client.info("stats")["total_reads_processed"]
    assert calls["cmdstat_evalsha"] == 40  # one per user
    assert calls["cmdstat_set"] == 40
    assert calls["cmdstat_get"] == 2 * 40  # inside the scripts: the sequence and the tier
    assert calls["cmdstat_zrevrange"] == 2
    # The server reads its socket in pieces; a round trip per event would be hundreds of reads.
    assert reads < 20


async def test_a_server_that_lost_its_scripts_gets_them_again(
    redis_store: RedisStore, redis_url: str
) -> None:
    await redis_store.append([event(0)])
    with redis.Redis.from_url(redis_url) as client:
        client.script_flush()
    answers, _ = await redis_store.append([event(0), event(1), event(2, user_id=2)])
    assert [answer.applied for answer in answers] == [False, True, True]
    assert items_of(answers[1].sequence) == [1000, 1001]


@pytest.mark.parametrize(
    "foreign", [b"", b"\x01", b"\x07\x00", b"\x01\x02short", b"\x01\x00seven..", b"\x02\x00" + bytes(12)]
)
async def test_a_value_that_is_no_sequence_reads_as_none_and_is_written_over(
    redis_store: RedisStore, redis_url: str, foreign: bytes
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.set(keys.sequence(1), foreign)
    assert items_of(await value_of(redis_store)) == []
    answers, _ = await redis_store.append([event(0), event(1)])
    assert [items_of(answer.sequence) for answer in answers] == [[1000], [1000, 1001]]


def random_log(seed: int, length: int) -> list[Append]:
    """A log of 3 partitions and 4 users, users moving between partitions, ids of every size."""
    rng = random.Random(seed)
    offsets = [rng.randrange(1000) for _ in range(3)]
    sizes = [100, 2**30 - 1, 2**30, 2**32 - 1, 2**32, 2**53 + 1, MAX_ID]
    wide = rng.random() < 0.5
    log, now_s = [], 1_511_539_200
    for _ in range(length):
        partition = rng.randrange(3)
        offsets[partition] += rng.randrange(1, 4)
        now_s += rng.choice([0, 1, 5, 30, 400])
        most = rng.choice(sizes) if wide and rng.random() < 0.05 else 2**30 - 1
        log.append(
            Append(
                user_id=rng.choice([0, 1, 2**53 + 1, MAX_ID]),
                item_id=most - rng.randrange(100),
                category_id=most - rng.randrange(100),
                behavior=rng.randrange(4),
                timestamp=now_s - rng.choice([0, 0, 0, 700, 5000]),
                epoch=9,
                partition=partition,
                offset=offsets[partition],
            )
        )
    return log


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[list[Append], list[list[Append]]]:
    """A log, and batches that deliver all of it with arbitrary steps back."""
    log = random_log(draw(st.integers(0, 2**32)), draw(st.integers(1, 330)))
    batches: list[list[Append]] = []
    at = 0
    while at < len(log):
        end = min(len(log), at + draw(st.integers(1, 120)))
        batches.append(log[at:end])
        back = draw(st.integers(0, 60)) if draw(st.booleans()) else 0
        at = end if end == len(log) else max(0, end - back)
        if back and end - back <= 0 and len(batches) > 12:
            at = end
    if draw(st.booleans()):
        batches.append(log[draw(st.integers(0, len(log) - 1)) :])
    return log, batches


async def deliver(store: FeatureStore, batches: Sequence[Sequence[Append]]) -> int:
    applied = 0
    for batch in batches:
        answers, _ = await store.append(batch)
        applied += sum(answer.applied for answer in answers)
    return applied


async def check_delivery(store: FeatureStore, log: list[Append], batches: list[list[Append]]) -> None:
    oracle = Oracle()
    for each in log:
        assert oracle.append(each)
    assert await deliver(store, batches) == len(log)
    users = list(oracle.events)
    values = await values_of(store, users)
    assert {user: events_of(value) for user, value in zip(users, values, strict=True)} == oracle.events


@settings(max_examples=60, deadline=None)
@given(deliveries())
async def test_any_delivery_in_memory_gives_the_sequences_of_the_log(
    delivery: tuple[list[Append], list[list[Append]]],
) -> None:
    await check_delivery(MemoryStore(settings=SETTINGS), *delivery)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(delivery=deliveries())
async def test_any_delivery_to_redis_gives_the_sequences_of_the_log_and_the_bytes_of_the_twin(
    redis_url: str, delivery: tuple[list[Append], list[list[Append]]]
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
    store, twin = RedisStore(redis_url, settings=SETTINGS), MemoryStore(settings=SETTINGS)
    try:
        await check_delivery(store, *delivery)
        await deliver(twin, delivery[1])
        users = sorted({each.user_id for each in delivery[0]})
        assert await store.read(users) == await twin.read(users)
    finally:
        await store.close()


def test_adding_logarithms_is_adding_weights() -> None:
    assert log2_add(3.0, 3.0) == 4.0
    assert log2_add(1e6, 1e6) == 1e6 + 1
    assert log2_add(5.0, 1e6) == 1e6
    assert np.isclose(log2_add(np.log2(5), np.log2(11)), 4.0)


async def test_writers_at_once_neither_lose_nor_repeat_events(redis_url: str) -> None:
    """Two workers that both believe they own the partition: a zombie after a rebalance."""
    log = [event(offset, user_id=offset % 5) for offset in range(200)]
    batches = [log[at : at + 10] for at in range(0, 200, 10)]
    stores = [RedisStore(redis_url, settings=SETTINGS) for _ in range(2)]
    applied = await asyncio.gather(*(deliver(store, batches) for store in stores))
    assert sum(applied) == 200
    values = await values_of(stores[0], range(5))
    for user, value in enumerate(values):
        assert items_of(value) == [1000 + offset for offset in range(user, 200, 5)]
    for store in stores:
        await store.close()
