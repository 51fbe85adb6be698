from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence

import pytest

from features import keys
from features.memory_store import MemoryStore
from features.redis_store import RedisStore
from features.settings import FeatureSettings
from features.statistics import ItemStatistics, ItemWeights
from features.store import Append, StoreUnavailable

DAY_S = 86400
START_S = 1_511_539_200
HALF_LIFE_S = 3600.0
SETTINGS = FeatureSettings(
    popularity_half_life_s=HALF_LIFE_S,
    transition_half_life_s=HALF_LIFE_S,
    behavior_weights=(1.0, 2.0, 4.0, 8.0),
    store_timeout_ms=5_000,
    statistics_fresh_ms=10_000,
)


class World:
    """A store, its statistics and a log that grows by clicks."""

    def __init__(self, store: MemoryStore | RedisStore | None = None, **changes: object) -> None:
        self.now_s = 0.0
        self.settings = SETTINGS.model_copy(update=changes)
        self.store = store or MemoryStore()
        self.statistics = ItemStatistics(self.store, settings=self.settings, clock=lambda: self.now_s)
        self.offset = 0

    def clicks(
        self, *given: tuple[int, int], category: int = 7, behavior: int = 0, at_s: int = 0
    ) -> list[Append]:
        """(user, item) pairs, `at_s` after the start."""
        made = []
        for user, item in given:
            self.offset += 1
            made.append(Append(user, item, category, behavior, START_S + at_s, 1, 0, self.offset))
        return made

    async def take(self, events: Sequence[Append]) -> list[str]:
        """One turn of the stream; the names it read."""
        names = self.statistics.needed(events)
        appended, read = await self.store.append(events, neighbours=names, limit=self.statistics.limit)
        self.statistics.absorb(names, read)
        self.statistics.observe(events, appended)
        return names

    async def settle(self) -> None:
        """Write what was counted and read everything anew, as timers would."""
        await self.statistics.flush()
        await self.statistics.refresh()
        self.now_s += 60.0

    async def following(self, item: int) -> dict[int, float]:
        self.statistics.transitions([item])
        await self.take([])
        return as_dict(self.statistics.transitions([item])[0])


def as_dict(weights: ItemWeights) -> dict[int, float]:
    return dict(zip(weights.items.tolist(), weights.weights.tolist(), strict=True))


async def test_what_follows_an_item_is_counted_per_user() -> None:
    world = World()
    await world.take(world.clicks((1, 10), (2, 99), (1, 20), (2, 20), (3, 10), (3, 30), (4, 10), (4, 20)))
    await world.settle()
    after = await world.following(10)
    assert list(after) == [20, 30]
    assert after[20] == pytest.approx(2 * after[30])
    assert await world.following(20) == {}
    # A share, so that one lone transition does not count as certainty.
    assert sum(after.values()) < 1.0


async def test_the_same_item_again_is_no_transition() -> None:
    world = World()
    await world.take(world.clicks((1, 10), (1, 10), (1, 10)))
    await world.settle()
    assert await world.following(10) == {}


async def test_clicks_the_store_had_seen_count_once() -> None:
    world = World()
    events = world.clicks((1, 10), (1, 20))
    for _ in range(3):
        await world.take(events)
    await world.settle()
    (read,) = await world.store.neighbours([keys.transitions(10)], 5)
    assert read.log2_weights[0] == pytest.approx((START_S / HALF_LIFE_S), abs=1e-6)


async def test_a_wide_sequence_tells_its_previous_item_too() -> None:
    world = World()
    await world.take(world.clicks((1, 2**62 + 1), (1, 2**61 + 3)))
    await world.settle()
    assert list(await world.following(2**62 + 1)) == [2**61 + 3]


async def test_behaviours_weigh_and_age_halves() -> None:
    world = World()
    await world.take(world.clicks((1, 10), (2, 10), behavior=3))  # 2 × 8, two half-lives old
    await world.take(world.clicks((3, 11), (4, 12), (5, 12), at_s=int(2 * HALF_LIFE_S)))
    await world.settle()
    popular = as_dict(world.statistics.popular())
    assert list(popular) == [10, 12, 11]
    assert popular == pytest.approx({10: 1.0, 12: 0.5, 11: 0.25})


async def test_a_list_of_items_is_as_long_as_its_items() -> None:
    world = World()
    assert not world.statistics.popular()
    assert len(world.statistics.transitions([1])[0]) == 0
    await world.take(world.clicks((1, 10), (2, 11), (3, 12)))
    await world.settle()
    assert len(world.statistics.popular()) == 3


async def test_categories_are_popular_on_their_own() -> None:
    world = World()
    await world.take(world.clicks((1, 10), (2, 10), (3, 11), category=7))
    await world.take(world.clicks((1, 50), category=8))
    await world.settle()
    world.statistics.categories([7, 8, 9])
    await world.take([])
    seven, eight, nine = map(as_dict, world.statistics.categories([7, 8, 9]))
    assert (seven, eight, nine) == (pytest.approx({10: 1.0, 11: 0.5}), {50: 1.0}, {})


async def test_a_replay_of_years_ago_then_live_clicks_then_the_replay_again_stay_finite() -> None:
    world = World()
    years_s = 9 * 365 * DAY_S
    await world.take(world.clicks((1, 10), (1, 11)))
    await world.settle()
    await world.take(world.clicks((2, 10), (2, 12), at_s=years_s))
    await world.settle()
    assert list(as_dict(world.statistics.popular())) in ([12, 10, 11], [10, 12, 11])
    after = await world.following(10)
    assert list(after) == [12, 11]
    assert after[11] == 0.0
    # A process that replays the old log against statistics of today.
    late = World(world.store)
    late.offset = world.offset
    await late.take(late.clicks((3, 10), (3, 13)))
    after = await late.following(10)
    assert all(math.isfinite(weight) for weight in after.values())
    assert after[12] == pytest.approx(1.0)


async def test_a_list_is_read_once_while_fresh_and_again_after() -> None:
    world = World()
    events = world.clicks((1, 10), (2, 10), (3, 11))
    assert await world.take(events) == [keys.transitions(10), keys.category(7), keys.transitions(11)]
    world.now_s += 9.0
    assert await world.take(events) == []
    world.now_s += 2.0
    assert len(await world.take(events)) == 3


async def test_a_list_whose_answer_never_came_is_asked_for_again_soon() -> None:
    world = World()
    events = world.clicks((1, 10))
    assert len(world.statistics.needed(events)) == 2
    assert world.statistics.needed(events) == []
    world.now_s += 1.5
    assert len(world.statistics.needed(events)) == 2


async def test_what_readers_miss_is_read_with_the_next_batch_within_its_room() -> None:
    world = World(statistics_reads=5)
    world.statistics.transitions(range(100, 110))
    first = await world.take(world.clicks((1, 10)))
    assert first[:2] == [keys.transitions(10), keys.category(7)]
    assert len(first) == 5
    others = await world.take([]) + await world.take([]) + await world.take([])
    assert sorted(first[2:] + others) == sorted(keys.transitions(item) for item in range(100, 110))


async def test_the_cache_is_bounded_and_keeps_what_is_used() -> None:
    world = World(statistics_cached=10)
    for item in range(100, 160):
        await world.take(world.clicks((1, 10), (2, item)))
    assert await world.take(world.clicks((1, 10), (2, 159), (3, 155))) == []
    assert await world.take(world.clicks((2, 120))) == [keys.transitions(120)]


async def test_what_is_kept_does_not_keep_the_batch_it_came_with() -> None:
    world = World()
    await world.take(world.clicks((1, 10), (1, 20), (1, 30), (1, 40)))
    await world.settle()
    world.statistics.transitions([10, 20, 30])
    await world.take([])
    for kept in world.statistics.transitions([10, 20, 30]):
        assert kept.items.base is None
        assert kept.weights.base is None


class CountingStore(MemoryStore):
    """Takes the first `takes` round trips and keeps how many increments each had."""

    def __init__(self, takes: int = 1_000) -> None:
        super().__init__()
        self.takes = takes
        self.round_trips: list[int] = []

    async def increment(self, increments: Mapping[str, Mapping[int, float]]) -> None:
        if len(self.round_trips) == self.takes:
            raise StoreUnavailable("away")
        await super().increment(increments)
        self.round_trips.append(sum(map(len, increments.values())))


async def test_increments_wait_while_the_store_is_away_and_arrive_after() -> None:
    store = CountingStore(takes=0)
    world = World(store)
    await world.take(world.clicks((1, 10), (1, 20)))
    waiting = world.statistics.pending
    assert waiting > 0
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            await world.statistics.flush()
    assert world.statistics.pending == waiting
    await world.take(world.clicks((2, 10), (2, 20)))
    store.takes = 1_000
    await world.settle()
    assert world.statistics.pending == 0
    (read,) = await store.neighbours([keys.transitions(10)], 5)
    assert read.log2_weights[0] == pytest.approx(START_S / HALF_LIFE_S + 1, abs=1e-6)


def crowd(world: World) -> list[Append]:
    """50 users who go from one item to one each: 50 transitions, 51 items in the one category and of all."""
    return world.clicks(*((user, item) for user in range(50) for item in (1000, user)))


async def test_no_round_trip_writes_more_increments_than_set_however_few_the_statistics() -> None:
    store = CountingStore()
    world = World(store, flush_increments=16)
    await world.take(crowd(world))
    waiting = world.statistics.pending
    assert waiting == 50 + 2 * 51
    await world.statistics.flush()
    assert store.round_trips == [16] * 9 + [8]
    assert world.statistics.pending == 0
    everything = await store.neighbours([keys.transitions(1000), keys.category(7), keys.POPULAR], 100)
    assert [len(read.items) for read in everything] == [50, 51, 51]


async def test_what_was_written_before_the_store_went_away_is_not_written_again() -> None:
    store, whole = CountingStore(takes=3), World()
    world = World(store, flush_increments=16)
    for one in (world, whole):
        await one.take(crowd(one))
    with pytest.raises(StoreUnavailable):
        await world.statistics.flush()
    assert world.statistics.pending == 50 + 2 * 51 - 3 * 16
    store.takes = 1_000
    await world.statistics.flush()
    await whole.statistics.flush()
    names = [keys.transitions(1000), keys.category(7), keys.POPULAR]
    for read, expected in zip(
        await store.neighbours(names, 100), await whole.store.neighbours(names, 100), strict=True
    ):
        assert read.items.tolist() == expected.items.tolist()
        assert read.log2_weights.tolist() == pytest.approx(expected.log2_weights.tolist())


async def test_a_flush_that_is_stopped_keeps_what_it_has_not_written() -> None:
    class HungStore(MemoryStore):
        async def increment(self, increments: Mapping[str, Mapping[int, float]]) -> None:
            await asyncio.Event().wait()

    world = World(HungStore(), flush_increments=16)
    await world.take(crowd(world))
    waiting = world.statistics.pending
    flushing = asyncio.create_task(world.statistics.flush())
    await asyncio.sleep(0)
    assert world.statistics.pending == waiting - 16
    flushing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await flushing
    assert world.statistics.pending == waiting


async def test_waiting_increments_are_bounded_and_what_is_dropped_is_counted() -> None:
    store = CountingStore(takes=0)
    world = World(store, pending_max=50)
    for item in range(100):
        await world.take(world.clicks((item, item)))
    assert 50 <= world.statistics.pending <= 53
    assert world.statistics.dropped > 0


async def test_real_redis_gives_what_the_twin_gives(redis_url: str) -> None:
    worlds = [World(), World(RedisStore(redis_url, settings=SETTINGS), flush_increments=3)]
    answers = []
    for world in worlds:
        for turn in range(40):
            users = range(turn % 5, 30, 3)
            events = world.clicks(*((user, (user * 7 + turn * turn) % 23) for user in users), at_s=turn * 300)
            await world.take(events)
            if turn % 7 == 0:
                await world.settle()
        await world.settle()
        answers.append(
            [as_dict(world.statistics.popular()), *[await world.following(item) for item in range(23)]]
        )
    assert sum(map(len, answers[0])) > 50
    assert [pytest.approx(one, rel=1e-4) for one in answers[0]] == answers[1]
    await worlds[1].store.close()
