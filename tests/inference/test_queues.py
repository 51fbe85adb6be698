"""Who goes first, on a loop whose clock the test moves."""

from __future__ import annotations

from inference.errors import DeadlineExceeded
from tests.inference.batcher_world import Question, World, on_clock, questions


def test_high_goes_before_normal_before_low_and_does_not_wait_for_company() -> None:
    async def story() -> None:
        world = World(max_batch=2, wait_ms=50)
        world.ask(Question(1), Question(2))
        await world.turn()
        world.ask(
            Question(3, "low"), Question(4), Question(5, "high"), Question(6, "low"), Question(7, "high")
        )
        await world.settle()
        assert world.batches == [[1, 2], [5, 7], [4, 3]]
        urgent = world.ask(Question(8, "high"))
        await world.turn()
        await world.finish()
        assert world.batches[3] == [8], "alone: company would make it take longer"
        assert await urgent == [80]

    on_clock(story)


def test_within_a_priority_the_higher_tier_goes_first() -> None:
    async def story() -> None:
        world = World(max_batch=2)
        world.ask(Question(0))
        await world.turn()
        world.ask(Question(1, tier=0), Question(2, tier=2), Question(3), Question(4, tier=2))
        world.ask(Question(5, "low", tier=2), Question(6, "high", tier=0))
        await world.settle()
        assert world.batches == [[0], [6], [2, 4], [3, 1], [5]]

    on_clock(story)


def test_while_more_waits_than_can_be_ranked_one_lane_is_left_to_the_highest_tier() -> None:
    async def story() -> None:
        world = World(runners=2, max_batch=2)
        world.ask(Question(0, tier=2))
        await world.settle()
        world.ask(*questions(*range(1, 9)))
        await world.turn()
        assert len(world.executor.held) == 1, "the other lane is kept"
        first = world.ask(Question(9, tier=2))
        await world.turn()
        assert len(world.executor.held) == 2
        world.executor.held.reverse()
        await world.finish()
        assert await first == [90], "it waited for nobody"
        await world.settle()
        assert world.batches[:3] == [[0], [9], [1, 2]], "and had no company"
        world = World(runners=2, max_batch=2)
        world.ask(Question(0, tier=2))
        await world.settle()
        await world.advance(2.0)
        world.ask(*questions(*range(10, 18)))
        await world.turn()
        assert len(world.executor.held) == 2, "when none of it comes any more, both lanes serve the rest"
        await world.settle()

    on_clock(story)


def test_a_queue_that_is_short_for_a_moment_does_not_cost_the_highest_tier_its_lane() -> None:
    async def story() -> None:
        world = World(runners=2, max_batch=4)
        world.ask(Question(0, tier=2))
        await world.settle()
        world.ask(*questions(*range(1, 7)))
        await world.turn()
        await world.finish()
        assert world.batches[1:] == [[1, 2, 3, 4]]
        assert len(world.executor.held) == 1, "two are left, and go on one lane"
        first = world.ask(Question(7, tier=2))
        await world.turn()
        assert len(world.executor.held) == 2, "the highest tier waits for no company"
        world.executor.held.reverse()
        await world.finish()
        assert await first == [70]
        assert world.batches[2:] == [[7]], "alone"
        await world.advance(0.05)
        world.ask(Question(8))
        await world.advance(0.05)
        assert len(world.executor.held) == 1, "its lane is kept, however short the queue"
        await world.settle()
        await world.advance(0.3)
        world.ask(Question(9))
        await world.turn()
        world.ask(Question(10))
        await world.advance(0.03)
        assert len(world.executor.held) == 2, "after a while both lanes serve all"
        await world.settle()

    on_clock(story)


def test_who_has_no_lane_kept_is_told_at_once_what_the_lanes_that_are_left_cannot_do_in_time() -> None:
    async def story() -> None:
        world = World(runners=2, max_batch=2)
        world.ask(Question(0, tier=2))
        await world.settle()
        world.ask(*questions(*range(1, 11)))
        await world.turn()
        in_time_s = world.loop.time() + 0.09
        below = world.ask(Question(11, deadline_s=in_time_s))
        top = world.ask(Question(12, tier=2, deadline_s=in_time_s))
        await world.turn()
        (told,) = await below
        assert isinstance(told, DeadlineExceeded), "both lanes could, one cannot"
        await world.settle()
        assert await top == [120]

    on_clock(story)


def test_beside_the_highest_tier_others_go_in_small_batches_and_start_none_while_it_is_ranked() -> None:
    async def story() -> None:
        world = World(runners=2, max_batch=16)
        world.ask(Question(0, tier=2))
        await world.settle()
        world.ask(*questions(*range(1, 41)))
        await world.turn()
        world.ask(Question(50, tier=2))
        await world.turn()
        assert len(world.executor.held) == 2
        await world.finish()
        await world.turn()
        assert world.batches[1:] == [list(range(1, 9))], "eight, though sixteen may go together"
        assert len(world.executor.held) == 1, "side by side they would slow the highest tier down"
        await world.advance(0.006)
        assert len(world.executor.held) == 2, "but they do not wait for long"
        await world.settle()
        assert world.batches[2:4] == [[50], list(range(9, 17))]

    on_clock(story)
