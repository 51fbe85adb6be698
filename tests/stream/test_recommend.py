"""The request path: what a user, and the next owner of a partition, would notice."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import orjson
import pytest

from features.memory_store import MemoryStore
from features.store import StoreUnavailable
from inference.errors import DeadlineExceeded
from tests.stream.worlds import NOW_S, World
from tests.support import eventually_async
from topics.codec import decode_recommendation


async def test_a_click_changes_the_next_list_of_its_user():
    world = World()
    await world.clicks(world.click(1, 10))
    await world.clicks(world.click(1, 11))
    first, second = world.outbox.bodies("recommendations")
    assert [item["item_id"] for item in first["items"]] == [10]
    assert [item["item_id"] for item in second["items"]] == [11, 10]


async def test_clicks_of_one_user_in_one_unit_see_each_other_in_order():
    world = World()
    await world.clicks(world.click(1, 10), world.click(2, 99), world.click(1, 11), world.click(1, 12))
    lists = {
        body["trigger"]["clicks"][0]["item_id"]: [item["item_id"] for item in body["items"]]
        for body in world.outbox.bodies("recommendations")
    }
    assert lists == {10: [10], 99: [99], 11: [11, 10], 12: [12, 11, 10]}


async def test_every_list_is_a_recommendation_and_its_id_is_a_function_of_the_clicks_place():
    world = World()
    line = world.click(1, 10)
    await world.clicks(line)
    await world.clicks(line)  # the same record again, as after a crash
    records = world.outbox.records("recommendations")
    first, again = (decode_recommendation(record.value, record.headers) for record in records)
    assert first.recommendation_id == again.recommendation_id == "clicks-00000007-0-0"
    assert first.items == again.items
    assert records[0].key == b"1"


async def test_coalesced_clicks_share_one_list_that_names_them_all():
    world = World(trigger="user")
    await world.clicks(world.click(1, 10), world.click(2, 99), world.click(1, 11))
    lists = world.outbox.bodies("recommendations")
    assert [[click["item_id"] for click in body["trigger"]["clicks"]] for body in lists] == [[10, 11], [99]]
    assert lists[0]["recommendation_id"].endswith("-2")


async def test_a_unit_is_released_only_when_its_lists_are_delivered():
    world = World()
    world.outbox.hold = asyncio.Event()
    unit = world.unit(world.click(1, 10))
    await world.path.clicks(unit)
    assert not world.released
    world.outbox.hold.set()
    await world.path.drain(5.0)
    assert world.released == [unit]


BAD = {
    "not-json": (b"1", b"{oops"),
    "not-an-object": (b"1", b"[1]"),
    "tombstone": (b"1", None),
    "too-large": (b"1", b'{"a":"' + b"x" * 70_000 + b'"}'),
    "missing-field": (b"1", orjson.dumps({"event_id": "e"})),
}


@pytest.mark.parametrize("reason", BAD)
async def test_what_cannot_be_read_becomes_a_dead_letter_and_the_rest_is_served(reason):
    world = World()
    key, value = BAD[reason]
    bad = world.line(key, value, headers=[("trace", b"abc")])
    unit = await world.clicks(world.click(1, 10), bad, world.click(2, 20))
    (letter,) = world.outbox.records("clicks.dead-letter")
    assert (letter.key, letter.value) == (key, value)
    headers = dict(letter.headers)
    assert headers["reason"] == reason.encode()
    assert (headers["topic"], headers["partition"], headers["offset"]) == (
        b"clicks",
        b"0",
        b"%d" % bad.offset,
    )
    assert headers["attempts"] == b"1"
    assert headers["trace"] == b"abc"
    assert len(world.outbox.bodies("recommendations")) == 2
    assert world.released == [unit]


async def test_a_replayed_dead_letter_that_fails_again_counts_its_attempts():
    world = World()
    await world.clicks(world.line(b"1", b"nope", headers=[("attempts", b"2"), ("reason", b"not-json")]))
    (letter,) = world.outbox.records("clicks.dead-letter")
    assert [value for name, value in letter.headers if name == "attempts"] == [b"3"]
    assert [name for name, _ in letter.headers].count("reason") == 1


async def test_null_header_values_are_no_reason_to_stumble():
    world = World()
    await world.clicks(
        world.line(b"1", b"nope", headers=[("tailrace-schema", None), ("attempts", None), ("trace", None)]),
        world.click(2, 20),
    )
    (letter,) = world.outbox.records("clicks.dead-letter")
    headers = dict(letter.headers)
    assert headers["reason"] == b"schema-version"
    assert (headers["attempts"], headers["trace"]) == (b"1", None)
    assert len(world.outbox.bodies("recommendations")) == 1


async def test_a_record_that_fails_in_a_way_nobody_foresaw_is_buried_and_the_rest_is_answered():
    world = World()
    world.ranking.poisonous = {2}
    bad = world.click(2, 20)
    unit = await world.clicks(world.click(1, 10), bad, world.click(1, 11))
    (letter,) = world.outbox.records("clicks.dead-letter")
    headers = dict(letter.headers)
    assert (letter.value, headers["reason"], headers["offset"]) == (
        bad.value,
        b"unforeseen",
        b"%d" % bad.offset,
    )
    assert b"a bug" in headers["detail"]
    lists = world.outbox.bodies("recommendations")
    # The append of 11 came first, and coming again it changes nothing.
    assert [[item["item_id"] for item in body["items"]] for body in lists] == [[11, 10], [11, 10]]
    assert world.released == [unit]


class StumblingStore(MemoryStore):
    """A store with a bug about item 20."""

    async def append(self, appends, *, neighbours=(), limit=50):
        if any(event.item_id == 20 for event in appends):
            raise ZeroDivisionError("a bug")
        return await super().append(appends, neighbours=neighbours, limit=limit)


async def test_a_unit_that_cannot_be_appended_is_served_before_the_next_one():
    world = World(StumblingStore())
    first = world.unit(world.click(1, 10), world.click(2, 20))
    await world.path.clicks(first)
    assert world.released == [first]
    await world.clicks(world.click(1, 11))
    lists = world.outbox.bodies("recommendations")
    assert [[item["item_id"] for item in body["items"]] for body in lists] == [[10], [11, 10]]
    assert len(world.outbox.records("clicks.dead-letter")) == 1


async def test_a_dead_letter_too_large_for_its_topic_costs_no_other_letter_its_bytes():
    world = World()
    world.outbox.most_bytes = 10_000
    unit = await world.clicks(
        world.line(b"1", b"small"),
        world.line(b"1", b"x" * 20_000),
        world.line(b"k" * 20_000, b"y", headers=[("h", b"z" * 20_000)]),
    )
    small, value, key = world.outbox.records("clicks.dead-letter")
    assert small.value == b"small"
    assert (value.key, value.value, dict(value.headers)["dropped"]) == (b"1", None, b"value")
    assert (key.key, key.value, dict(key.headers)["offset"]) == (None, None, b"2")
    assert dict(key.headers)["dropped"] == b"key, value, headers"
    assert world.released == [unit]


async def test_a_unit_of_nothing_but_bad_records_is_released():
    world = World()
    unit = await world.clicks(world.line(b"1", b"nope"))
    assert world.released == [unit]


async def test_what_cannot_be_ranked_in_time_is_answered_with_the_users_last_list_and_says_so():
    world = World()
    await world.clicks(world.click(1, 10))
    world.ranking.error = DeadlineExceeded("late")
    unit = await world.clicks(world.click(1, 11))
    body = world.outbox.bodies("recommendations")[-1]
    assert body["degraded"] == "cached"
    assert [item["item_id"] for item in body["items"]] == [10]
    assert world.released[-1] == unit


async def test_without_a_last_list_the_degraded_answer_is_what_is_popular():
    world = World()
    for user in range(5):
        await world.clicks(world.click(user, 77))
    await world.statistics.flush()
    await world.statistics.refresh()
    world.ranking.error = DeadlineExceeded("late")
    await world.clicks(world.click(9, 11))
    body = world.outbox.bodies("recommendations")[-1]
    assert body["degraded"] == "popular"
    assert body["items"][0]["item_id"] == 77


class FailingStore(MemoryStore):
    """A store that is away for the first `failures` appends."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures

    async def append(self, appends, *, neighbours=(), limit=50):
        if self.failures:
            self.failures -= 1
            raise StoreUnavailable("away")
        return await super().append(appends, neighbours=neighbours, limit=limit)

    async def read(self, user_ids):
        raise StoreUnavailable("away")


async def test_while_redis_is_away_clicks_wait_and_a_degraded_list_goes_out_under_the_same_id():
    world = World(FailingStore(3))
    unit = await world.clicks(world.click(1, 10))
    degraded, full = world.outbox.bodies("recommendations")
    assert degraded["degraded"] == "popular"
    assert "degraded" not in full
    assert degraded["recommendation_id"] == full["recommendation_id"]
    assert [item["item_id"] for item in full["items"]] == [10]
    assert world.released == [unit]


async def test_the_full_list_comes_after_the_degraded_one_though_kafka_is_slow():
    world = World(FailingStore(3))
    world.outbox.hold = asyncio.Event()
    unit = world.unit(world.click(1, 10))
    await world.path.clicks(unit)
    for _ in range(20):
        await asyncio.sleep(0)
    assert world.ranking.asked == []
    world.outbox.hold.set()
    await world.path.drain(5.0)
    assert ["degraded" in body for body in world.outbox.bodies("recommendations")] == [True, False]


async def test_what_waited_for_redis_has_its_full_time_to_be_ranked_once_redis_is_back():
    world = World(FailingStore(3), click_deadline_ms=1_000)
    loop = asyncio.get_running_loop()
    read = world.unit(world.click(1, 10))
    await world.path.clicks(replace(read, received_s=loop.time() - 20))
    back_s = loop.time()
    # A unit that waited behind it, too.
    await world.path.clicks(replace(world.unit(world.click(2, 20)), received_s=loop.time() - 20))
    await world.path.drain(5.0)
    assert all(asked.deadline_s > back_s + 0.9 for asked in world.ranking.asked)


async def test_waiting_for_redis_is_told_for_as_long_as_it_lasts():
    store = FailingStore(10**9)
    world = World(store)
    appending = asyncio.ensure_future(world.path.clicks(world.unit(world.click(1, 10))))
    await eventually_async(lambda: world.path.waits_for_store)
    store.failures = 0
    await appending
    assert not world.path.waits_for_store
    await world.path.drain(5.0)


async def test_a_request_is_answered_with_its_own_k_candidates_and_excludes():
    world = World()
    await world.clicks(*(world.click(1, item) for item in range(10, 20)))
    await world.requests(
        {"request_id": "a", "user_id": 1, "k": 3, "exclude": [19]},
        {"request_id": "b", "user_id": 1, "candidates": [5, 6, 7], "exclude": [6]},
        {"request_id": "c", "user_id": 404},
    )
    answers = {
        body["trigger"]["request_id"]: [item["item_id"] for item in body["items"]]
        for body in world.outbox.bodies("recommendations")
        if body["trigger"]["kind"] == "request"
    }
    assert answers == {"a": [18, 17, 16], "b": [5, 7], "c": []}


async def test_a_request_while_redis_is_away_is_answered_degraded_at_once():
    world = World(FailingStore(0))
    unit = await world.requests({"request_id": "a", "user_id": 1, "candidates": [5, 6], "exclude": [5]})
    (body,) = world.outbox.bodies("recommendations")
    assert body["degraded"] == "popular"
    assert [item["item_id"] for item in body["items"]] == [6]
    assert world.released == [unit]


async def test_a_future_timestamp_is_measured_by_the_workers_clock():
    world = World()
    await world.clicks(world.click(1, 10, timestamp=NOW_S + 3 * 86_400))
    (letter,) = world.outbox.records("clicks.dead-letter")
    assert dict(letter.headers)["reason"] == b"timestamp-future"
