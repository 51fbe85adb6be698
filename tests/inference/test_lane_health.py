"""Lanes that fail and hang, on a loop whose clock the test moves."""

from __future__ import annotations

from typing import Any

import pytest

from inference.dispatcher import Lane
from inference.errors import EngineFailed, ModelUnavailable
from inference.lane_health import LaneHealth
from tests.inference.batcher_world import Question, World, on_clock, questions


def raises(items: list[Question]) -> list[Any]:
    raise RuntimeError("out of order")


def not_finite(items: list[Question]) -> list[Any]:
    return [EngineFailed("not finite") for _ in items]


@pytest.mark.parametrize("how", [raises, not_finite])
def test_what_one_engine_fails_at_another_answers_and_the_broken_one_is_left_alone(how: Any) -> None:
    async def story() -> None:
        world = World(runners=2, max_batch=4)
        world.broken[0] = how
        for number in range(6):
            asked = world.ask(Question(number), Question(100 + number))
            await world.settle()
            assert await asked == [number * 10, 1000 + number * 10]
        assert world.ran_on.count(0) == 3, "three times it was tried"
        assert world.lanes[0].out
        assert world.batcher.counts.failed == 0

    on_clock(story)


def test_an_engine_that_hangs_loses_its_batch_to_another_and_comes_back_after_its_probe() -> None:
    async def story() -> None:
        world = World(runners=2, hang_ms=300)
        well = False

        def probe() -> float:
            if not well:
                raise RuntimeError("still ill")
            return 1.0

        world.lanes[0].probe = probe
        stuck = world.ask(Question(1))
        await world.turn()
        hanging = world.executor.held.pop()
        await world.advance(0.31)
        await world.finish()
        assert await stuck == [10]
        assert world.ran_on == [1], "the other lane answered"
        other = world.ask(Question(2))
        await world.settle()
        assert await other == [20]
        assert world.lanes[0].out
        await world.advance(0.26)
        await world.finish()  # its probe
        assert world.lanes[0].out, "the probe says it is not well"
        well = True
        await world.advance(0.51)
        await world.finish()
        assert not world.lanes[0].out
        future, work, args = hanging
        future.set_result(work(*args))  # too late: nobody is answered twice
        await world.turn()
        assert (world.batcher.counts.answered, world.batcher.running) == (2, 0)

    on_clock(story)


def test_when_no_engine_is_well_nobody_waits() -> None:
    async def story() -> None:
        world = World(hang_ms=300)
        first, second = world.ask(Question(1)), world.ask(Question(2))
        await world.turn()
        world.executor.held.clear()
        await world.advance(0.31)
        assert [type(answer) for answer in (*await first, *await second)] == [EngineFailed] * 2
        late = world.ask(Question(3))
        await world.turn()
        assert [type(answer) for answer in await late] == [ModelUnavailable]
        await world.advance(0.26)
        again = world.ask(Question(4))
        await world.settle()
        assert await again == [40], "without a probe, a live batch is tried"

    on_clock(story)


def test_a_poisoned_item_fails_alone_also_where_two_engines_try_it() -> None:
    def run(items: list[Question]) -> list[int]:
        if any(item.number == 13 for item in items):
            raise ValueError("thirteen")
        return [item.number for item in items]

    async def story() -> None:
        world = World(run, runners=2, max_batch=32)
        asked = world.ask(*questions(*range(32)))
        await world.settle()
        answers = await asked
        assert isinstance(answers.pop(13), EngineFailed)
        assert answers == [number for number in range(32) if number != 13]
        assert not any(lane.out for lane in world.lanes)

    on_clock(story)


@pytest.mark.parametrize(
    ("spares", "others_s", "replaced"), [(2, 0.02, True), (0, 0.02, False), (2, 0.2, False)]
)
def test_a_lane_that_became_slow_alone_has_a_new_engine_where_there_is_one(
    spares: int, others_s: float, replaced: bool
) -> None:
    async def story() -> None:
        world, given = World(runners=2), [spares]

        def replace(lane: Lane) -> bool:
            assert lane is world.lanes[0]
            given[0] -= 1
            return given[0] >= 0

        health = LaneHealth(world.lanes, hang_s=1.0, changed=lambda: None, replace=replace)

        def batch(slow_s: float) -> None:
            for lane, took_s in zip(world.lanes, (slow_s, others_s), strict=True):
                lane.started(64, world.loop.time())
                lane.finished(64, took_s)
            health.refresh_slow()

        batch(0.2)
        assert world.lanes[0].profile.scale > 1.5, "one slow batch is a hiccup"
        batch(0.2)
        assert (world.lanes[0].profile.scale == 1.0) == replaced
        for _ in range(3):
            batch(0.2)
        assert world.lanes[0].profile.scale > 2.5, "not every moment"
        await world.advance(60.1)
        batch(0.2)
        assert (world.lanes[0].profile.scale == 1.0) == replaced
        assert given[0] == 0 or not replaced

    on_clock(story)


def renewing(world: World) -> tuple[LaneHealth, list[Lane]]:
    """With a new engine for every lane that is to have one, and the lanes that had one."""
    renewed: list[Lane] = []

    def replace(lane: Lane) -> bool:
        renewed.append(lane)
        return True

    return LaneHealth(world.lanes, hang_s=1.0, changed=lambda: None, replace=replace), renewed


def test_a_few_short_batches_that_took_long_are_no_reason_for_a_new_engine() -> None:
    async def story() -> None:
        world = World(runners=2)
        health, renewed = renewing(world)
        slow = world.lanes[0]
        for lane in world.lanes:
            lane.finished(4, 0.004)

        def batches(number: int, took_s: float) -> None:
            for _ in range(number):
                slow.started(4, world.loop.time())
                slow.finished(4, took_s)
                health.refresh_slow()

        batches(3, 0.03)
        assert slow.profile.scale > 2.5 and not renewed
        batches(30, 0.004)
        batches(3, 0.03)
        assert not renewed, "in between it was well"
        batches(1, 0.03)
        assert renewed == [slow]

    on_clock(story)


@pytest.mark.parametrize(("probe", "replaced"), [(1.5, False), (10.0, True)])
def test_a_lane_whose_work_has_become_more_keeps_its_engine(probe: float, replaced: bool) -> None:
    async def story() -> None:
        world = World(runners=2)
        health, renewed = renewing(world)
        lane = world.lanes[0]
        lane.probe = lambda: probe
        await world.advance(1.01)
        for each in world.lanes:
            each.finished(4, 0.004)
        for _ in range(5):
            lane.started(4, world.loop.time())
            lane.finished(4, 0.05)
            health.refresh_slow()
        assert not renewed, "it has not been asked yet"
        lane.started(4, world.loop.time())
        await world.settle()
        assert renewed == [lane] * replaced
        assert lane.profile.scale == 1.0
        assert not health.is_asking

    on_clock(story)


def test_a_probe_that_waits_for_a_long_batch_does_not_hang() -> None:
    async def story() -> None:
        world = World(runners=2, hang_ms=300)
        lane = world.lanes[0]
        lane.profile.scale = 20.0  # so that its batch may take long
        lane.probe = lambda: 1.0
        health = LaneHealth(world.lanes, hang_s=0.3, changed=lambda: None)
        world.lanes[1].out = True
        await world.advance(1.01)
        asked = world.ask(Question(1))
        await world.turn()
        health._ask(lane)
        await world.advance(1.0)
        assert not lane.out
        await world.finish()
        assert await asked == [10]
        world.executor.held.clear()  # this one has begun, and hangs
        health._ask(lane)
        _, probe, _ = world.executor.held.pop()
        probe()
        await world.advance(0.31)
        assert lane.out

    on_clock(story)


def test_lanes_that_became_slow_together_keep_their_engines() -> None:
    async def story() -> None:
        world = World(runners=2)

        def replace(lane: Lane) -> bool:
            raise AssertionError("it is the machine")

        health = LaneHealth(world.lanes, hang_s=1.0, changed=lambda: None, replace=replace)
        for took_s, others_s in (*[(0.2, 0.2)] * 2, *[(0.8, 0.06)] * 3):
            for lane, seconds in zip(world.lanes, (took_s, others_s), strict=True):
                lane.started(64, world.loop.time())
                lane.finished(64, seconds)
            health.refresh_slow()
        slow, other = (lane.profile.scale for lane in world.lanes)
        assert slow > 2.5 * other > 5.0

    on_clock(story)


@pytest.mark.parametrize(("probe", "back"), [(1.5, True), (None, True), (10.0, False)])
def test_a_lane_that_was_slow_for_a_moment_has_work_again_after_one_good_probe(
    probe: float | None, back: bool
) -> None:
    async def story() -> None:
        world = World(runners=2, max_batch=1)
        slow = world.lanes[0]
        slow.probe = None if probe is None else lambda: probe
        slow.profile.scale = 14.0
        for used in (False, back):
            world.ran_on.clear()
            world.lanes[1].profile.scale = 1.0
            asked = [world.ask(Question(number)) for number in range(2)]
            await world.settle()
            assert [await one for one in asked] == [[0], [10]]
            assert (0 in world.ran_on) == used
            await world.advance(1.01)
        assert (slow.profile.scale < 2.0) == back

    on_clock(story)
