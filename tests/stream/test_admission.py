"""Admission on the request path: who goes without a ranked list, what he gets instead, what is counted."""

from __future__ import annotations

import asyncio

import pytest

from inference.admission.load import LoadProbe, processors
from inference.admission.settings import AdmissionSettings, Tier
from inference.errors import DeadlineExceeded, Overloaded
from stream.resources import admission_of
from stream.settings import StreamSettings
from tests.stream.worlds import World
from tests.support import eventually_async


def settings(*tiers: Tier, **changes) -> AdmissionSettings:
    named = tiers or (Tier(name="free"), Tier(name="standard"), Tier(name="premium"))
    return AdmissionSettings(tiers=named, shared=False, **changes)


def shed(world: World) -> dict[tuple[str, str], float]:
    (metric,) = [m for m in world.metrics.registry.collect() if m.name == "tailrace_stream_shed"]
    return {
        (sample.labels["reason"], sample.labels["tier"]): sample.value
        for sample in metric.samples
        if sample.name == "tailrace_stream_shed_total" and sample.value
    }


def by_user(world: World) -> dict[int, list[str | None]]:
    """How the lists of each user were made, in order: None for a ranked one."""
    made: dict[int, list[str | None]] = {}
    for body in world.outbox.bodies("recommendations"):
        made.setdefault(body["user_id"], []).append(body.get("degraded"))
    return made


async def test_left_alone_every_click_of_a_flood_is_ranked_and_nothing_is_counted():
    world = World()
    for _ in range(4):
        await world.clicks(*(world.click(n % 3, n) for n in range(320)))
    assert len(world.outbox.bodies("recommendations")) == 1_280
    assert set(by_user(world)) == {0, 1, 2}
    assert all(made is None for lists in by_user(world).values() for made in lists)
    assert shed(world) == {}


async def test_a_user_over_his_rate_has_his_last_list_at_once_and_others_are_ranked():
    world = World(
        admission=settings(Tier(name="standard", client_rate=0.001, client_burst=2), Tier(name="premium"))
    )
    await world.clicks(world.click(1, 10))
    unit = await world.clicks(*(world.click(1, item) for item in range(11, 15)), world.click(2, 20))
    assert by_user(world) == {1: [None, None, "cached", "cached", "cached"], 2: [None]}
    assert shed(world) == {("client-rate", "standard"): 3}
    assert world.released[-1] is unit


async def test_the_tier_comes_from_the_store_whatever_an_event_says():
    world = World(
        admission=settings(Tier(name="standard", client_rate=0.001, client_burst=1), Tier(name="premium"))
    )
    await world.store.set_tier(1, "premium")
    await world.clicks(*(world.click(user, item) for item in (10, 11, 12) for user in (1, 2)))
    await world.requests(
        *(
            {"request_id": f"{user}-{n}", "user_id": user, "tier": "premium", "priority": "high"}
            for n in range(2)
            for user in (1, 2)
        )
    )
    made = by_user(world)
    assert made[1] == [None] * 5
    assert sorted(map(str, made[2])) == ["None", "cached", "cached", "popular", "popular"]
    assert {request.tier for request in world.ranking.asked if request.user_id == 1} == {1}
    assert shed(world) == {("client-rate", "standard"): 4}


async def test_a_tier_set_between_two_clicks_counts_from_the_second():
    world = World()
    await world.clicks(world.click(1, 10))
    await world.store.set_tier(1, "premium")
    await world.clicks(world.click(1, 11))
    await world.store.set_tier(1, "a tier nobody knows")
    await world.clicks(world.click(1, 12))
    assert [request.tier for request in world.ranking.asked] == [1, 2, 1]


async def test_when_there_is_no_room_the_lower_tiers_have_degraded_lists_and_premium_is_ranked():
    world = World(admission=settings(ceiling=4))
    for user, tier in ((1, "free"), (3, "premium")):
        await world.store.set_tier(user, tier)
    unit = await world.clicks(*(world.click(user, item) for item in range(10, 13) for user in (1, 2, 3)))
    made = by_user(world)
    assert made[3] == [None] * 3
    # Three of premium, so of the four places one is left, and standard comes before free.
    assert sorted(map(str, made[2])) == ["None", "popular", "popular"]
    assert made[1] == ["popular"] * 3
    assert shed(world) == {("concurrency", "free"): 3, ("concurrency", "standard"): 2}
    assert world.released == [unit]


class Held:
    """A ranking that answers when told to."""

    def __init__(self, world: World) -> None:
        self.inner = world.ranking
        self.go = asyncio.Event()

    async def rank(self, requests):
        await self.go.wait()
        return await self.inner.rank(requests)


async def test_what_is_shed_does_not_wait_for_what_is_in_hand_and_room_comes_back_with_the_answers():
    world = World(admission=settings(ceiling=2))
    held = Held(world)
    world.path._ranking = held
    first = world.unit(world.click(1, 10), world.click(2, 20))
    await world.path.clicks(first)
    await eventually_async(lambda: world.admission.limit.in_flight == 2)
    second = world.unit(world.click(3, 30))
    await world.path.clicks(second)
    await eventually_async(lambda: second in world.released)
    assert by_user(world) == {3: ["popular"]}
    held.go.set()
    await world.path.drain(5.0)
    assert world.admission.limit.in_flight == 0
    await world.clicks(world.click(3, 31))
    assert by_user(world)[3] == ["popular", None]


class HoldsLower(Held):
    """A ranking that keeps all but the top tier waiting."""

    async def rank(self, requests):
        if any(request.tier < 2 for request in requests):
            await self.go.wait()
        return await self.inner.rank(requests)


async def test_in_one_unit_neither_the_shed_nor_the_top_tier_wait_for_the_others_to_be_ranked():
    world = World(admission=settings(ceiling=2))
    world.path._ranking = held = HoldsLower(world)
    await world.store.set_tier(3, "premium")
    unit = world.unit(*(world.click(user, 10) for user in (1, 2, 3)), world.line(b"4", b"{oops"))
    await world.path.clicks(unit)
    await eventually_async(lambda: by_user(world) == {3: [None], 2: ["popular"]})
    assert len(world.outbox.records("clicks.dead-letter")) == 1
    assert not world.released
    held.go.set()
    await world.path.drain(5.0)
    assert by_user(world)[1] == [None]
    assert world.released == [unit]


@pytest.mark.parametrize(
    ("error", "reason"), [(Overloaded("full"), "queue"), (DeadlineExceeded("late"), "late")]
)
async def test_what_the_ranking_itself_could_not_do_in_time_is_counted_too(error, reason):
    world = World()
    world.ranking.error = error
    await world.clicks(world.click(1, 10))
    assert by_user(world) == {1: ["popular"]}
    assert shed(world) == {(reason, "standard"): 1}


async def test_a_request_with_no_time_left_is_answered_without_ranking():
    world = World()
    unit = world.unit(
        world.line(b"1", b'{"request_id":"a","user_id":1,"deadline_ms":1}', topic="recommendation-requests"),
        topic="recommendation-requests",
    )
    object.__setattr__(unit, "received_s", unit.received_s - 1.0)
    await world.path.requests(unit)
    await world.path.drain(5.0)
    assert world.ranking.asked == []
    assert by_user(world) == {1: ["popular"]}
    assert shed(world) == {("deadline", "standard"): 1}


async def test_places_are_given_back_whatever_becomes_of_the_ranking():
    world = World()
    world.ranking.poisonous = {2}
    await world.clicks(world.click(1, 10), world.click(2, 20))
    world.ranking.poisonous = set()
    world.path._ranking = Held(world)
    await world.path.clicks(world.unit(world.click(1, 11)))
    await eventually_async(lambda: world.admission.limit.in_flight == 1)
    await world.path.drain(0.01)
    await eventually_async(lambda: world.admission.limit.in_flight == 0)


async def test_the_ceiling_is_all_that_a_worker_may_read_ahead_and_the_target_follows_the_deadline():
    stream = StreamSettings(max_in_flight=100, poll_max_records=20, click_deadline_ms=400)
    limits = admission_of(stream, AdmissionSettings(shared=False)).limit._limits
    assert (limits.ceiling, limits.queue_target_ms) == (120, 200)
    told = settings(ceiling=7, queue_target_ms=15.0)
    limits = admission_of(stream, told).limit._limits
    assert (limits.ceiling, limits.queue_target_ms) == (7, 15)


@pytest.mark.parametrize(
    ("quota", "most"),
    [("50000 100000", 1), ("100000 100000", 1), ("max 100000", 10_000), ("6400000 100000", 64), ("", 10_000)],
)
def test_a_container_has_no_more_processors_than_its_limit(tmp_path, monkeypatch, quota, most):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(10_000), raising=False)
    (tmp_path / "cpu.max").write_text(quota)
    assert processors(tmp_path / "cpu.max") == most
    assert processors(tmp_path / "none") == 10_000


async def test_a_blocked_loop_is_measured_and_told():
    world = World()
    probe = LoadProbe(world.admission, world.metrics)
    loop = asyncio.get_running_loop()
    probe.tick(loop.time(), loop.time() - 0.3)
    assert world.metrics.loop_lag_s._value.get() == pytest.approx(0.3, abs=0.05)
    assert world.metrics.lists_limit._value.get() == world.admission.limit.limit
    world.path._ranking = Held(world)
    await world.path.clicks(world.unit(world.click(1, 10)))
    await eventually_async(lambda: world.admission.limit.in_flight == 1)
    for _ in range(3):
        probe.tick(loop.time(), loop.time() - 2.0)
    assert world.admission.limit.is_limiting
    await world.path.drain(0.0)
    running = asyncio.ensure_future(probe.run())
    await eventually_async(lambda: world.metrics.loop_lag_s._value.get() < 0.3)
    running.cancel()
