"""Deadlines, on a loop whose clock the test moves."""

from __future__ import annotations

import asyncio

import uvloop

from inference.batcher import Batcher
from inference.dispatcher import Lane
from inference.errors import DeadlineExceeded
from tests.inference.batcher_world import Question, World, on_clock


def test_an_expired_item_is_answered_without_being_run_and_its_neighbours_are_served() -> None:
    async def story() -> None:
        world = World(max_batch=2)
        world.ask(Question(1))
        await world.turn()
        doomed = world.ask(Question(2, deadline_s=100.05))
        patient = world.ask(Question(3, deadline_s=200.0), Question(4))
        await world.turn()
        await world.advance(0.06)
        assert isinstance((await doomed)[0], DeadlineExceeded), "answered while the engine is still busy"
        assert world.batcher.queued == 2, "its room is free again"
        await world.settle()
        assert world.batches == [[1], [3, 4]]
        assert await patient == [30, 40]
        assert world.batcher.counts.expired == 1

    on_clock(story)


def test_a_deadline_that_has_passed_already_never_reaches_the_engine() -> None:
    async def story() -> None:
        world = World()
        late = world.ask(Question(1, deadline_s=99.0), Question(2))
        await world.settle()
        answers = await late
        assert isinstance(answers[0], DeadlineExceeded)
        assert answers[1] == 20
        assert world.batches == [[2]]

    on_clock(story)


def test_who_is_late_is_told_so_before_the_deadline() -> None:
    """A busy event loop is late itself, and an answer has a way to go."""

    async def story() -> None:
        world = World()
        short, long = world.ask(Question(1, deadline_s=100.1)), world.ask(Question(2, deadline_s=101.0))
        await world.turn()
        await world.advance(0.094)
        assert not short.done()
        await world.advance(0.004)
        assert isinstance((await short)[0], DeadlineExceeded)
        await world.advance(0.89)
        assert not long.done()
        await world.advance(0.007)
        assert isinstance((await long)[0], DeadlineExceeded)

    on_clock(story)


def test_a_hung_engine_delays_nobody_past_the_deadline() -> None:
    async def story() -> None:
        world = World()
        stuck = world.ask(Question(1, deadline_s=100.1))
        await world.turn()
        assert len(world.executor.held) == 1
        await world.advance(0.2)
        assert isinstance((await stuck)[0], DeadlineExceeded)
        await world.settle()  # the answer that comes after all is dropped
        assert world.batcher.counts.answered == 0

    on_clock(story)


def test_what_the_queue_would_make_late_is_told_so_at_once() -> None:
    async def story() -> None:
        world = World(max_batch=2)
        for number in range(10):
            world.ask(Question(number))
        await world.turn()
        # Five batches of 20 ms are ahead.
        hurried = world.ask(Question(98, deadline_s=100.05))
        patient = world.ask(Question(99, deadline_s=100.5))
        urgent = world.ask(Question(97, "high", deadline_s=100.05))
        await world.turn()
        assert isinstance((await hurried)[0], DeadlineExceeded)
        assert not patient.done()
        assert not urgent.done(), "it goes before the others"
        await world.settle()
        assert (await patient, await urgent) == ([990], [970])

    on_clock(story)


def test_a_deadline_that_has_passed_troubles_no_later_one_on_the_loop_that_workers_run_on() -> None:
    async def story() -> None:
        lane = Lane("lane", lambda _, items: [item.number for item in items])
        batcher: Batcher[Question, int] = Batcher([lane])
        now_s = asyncio.get_running_loop().time()
        asked = [batcher.submit([Question(n, deadline_s=now_s + s)]) for n, s in enumerate((-1.0, 5.0))]
        (late,), (early,) = await asyncio.gather(*asked)
        assert (type(late), early) == (DeadlineExceeded, 1)
        assert await batcher.drain()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(story(), 10))
