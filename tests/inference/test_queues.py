"""Who goes first, on a loop whose clock the test moves."""

from __future__ import annotations

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


def test_while_more_waits_than_can_be_ranked_batches_are_short_and_the_highest_tier_goes_first() -> None:
    async def story() -> None:
        world = World(runners=2, max_batch=4)
        world.ask(Question(0, tier=2))
        await world.settle()
        world.ask(*questions(*range(1, 9)))
        await world.turn()
        assert len(world.executor.held) == 1, "the other lane would share the processor"
        first = world.ask(Question(9, tier=2))
        await world.turn()
        assert len(world.executor.held) == 1
        await world.finish()
        await world.finish()
        assert await first == [90]
        assert world.batches[:3] == [[0], [1, 2], [9, 3]], "half a batch, and who is first with company"
        await world.settle()

    on_clock(story)


def test_what_is_below_does_not_start_just_before_more_of_the_highest_tier_is_due() -> None:
    async def story() -> None:
        world = World(runners=2, max_batch=4)
        world.ask(*questions(*range(10, 30)))
        for number in range(60):  # one every 50 ms, a batch takes 20
            world.ask(Question(100 + number, tier=2))
            await world.advance(0.025)
            await world.settle()
            world.ask(*questions(200 + number, 300 + number))
            await world.advance(0.025)
        world.ask(*questions(*range(30, 40)))
        world.ask(Question(1, tier=2))
        await world.turn()
        await world.finish()
        assert len(world.executor.held) == 1, "there is time for a batch before the next one"
        await world.advance(0.045)
        await world.finish()
        assert not world.executor.held, "not for one more"
        last = world.ask(Question(2, tier=2))
        await world.turn()
        await world.finish()
        assert await last == [20]
        await world.advance(0.040)
        await world.finish()
        assert not world.executor.held
        await world.advance(0.030)
        assert len(world.executor.held) == 1, "nobody waits longer than until they are due"
        await world.settle()

    on_clock(story)


def test_without_anybody_to_go_first_all_lanes_take_full_batches() -> None:
    async def story() -> None:
        world = World(runners=2, max_batch=2)
        world.ask(Question(0, tier=2))
        await world.settle()
        await world.advance(2.0)
        world.ask(*questions(*range(10, 18)))
        await world.turn()
        assert len(world.executor.held) == 2, "none of the highest tier comes any more"
        await world.settle()
        assert world.batches[1:] == [[10, 11], [12, 13], [14, 15], [16, 17]]
        world.ask(*questions(*range(20, 28), tier=2))
        await world.turn()
        assert len(world.executor.held) == 2, "nobody is below"
        await world.settle()

    on_clock(story)
