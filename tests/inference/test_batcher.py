"""Groups, batches and draining, on a loop whose clock the test moves."""

from __future__ import annotations

import asyncio

import pytest

from inference.batcher import Batcher, BatcherLimits
from inference.dispatcher import Lane
from inference.errors import ModelUnavailable, Overloaded
from tests.inference.batcher_world import Question, World, on_clock, questions


def test_groups_share_batches_and_a_large_group_is_split() -> None:
    async def story() -> None:
        world = World(max_batch=4)
        first = world.ask(*questions(1, 2, 3))
        second = world.ask(*questions(4, 5, 6, 7, 8, 9))
        await world.settle()
        assert world.batches == [[1, 2, 3, 4], [5, 6, 7, 8], [9]]
        assert await first == [10, 20, 30]
        assert await second == [40, 50, 60, 70, 80, 90]
        counts = world.batcher.counts
        assert (counts.items, counts.answered, counts.batches, counts.largest_batch) == (9, 9, 3, 4)

    on_clock(story)


def test_a_lone_item_leaves_at_once_when_nothing_is_gained_by_waiting() -> None:
    async def story() -> None:
        world = World(wait_ms=0)
        world.ask(Question(1))
        await world.turn()
        assert len(world.executor.held) == 1
        await world.settle()

    on_clock(story)


def test_the_wait_starts_at_the_first_item_and_ends_early_when_the_batch_is_full() -> None:
    async def story() -> None:
        world = World(max_batch=3, wait_ms=10)
        await world.advance(5)  # an empty batcher has no clock
        asked = [world.ask(Question(1))]
        await world.advance(0.006)
        asked.append(world.ask(Question(2)))
        await world.advance(0.003)
        assert not world.executor.held, "9 ms after the first item"
        await world.advance(0.0011)
        assert len(world.executor.held) == 1, "10 ms after the first item, not after the second"
        await world.settle()
        asked += [world.ask(Question(number)) for number in (3, 4, 5)]
        await world.turn()
        assert len(world.executor.held) == 1, "full: nobody waits"
        await world.settle()
        assert world.batches == [[1, 2], [3, 4, 5]]
        assert [await task for task in asked] == [[10], [20], [30], [40], [50]]

    on_clock(story)


def test_while_a_batch_runs_the_next_one_fills() -> None:
    async def story() -> None:
        world = World(max_batch=8)
        tasks = [world.ask(Question(1))]
        await world.turn()
        for number in (2, 3, 4):
            tasks.append(world.ask(Question(number)))
            await world.turn()
        assert len(world.executor.held) == 1, "one in flight per runner"
        await world.settle()
        assert world.batches == [[1], [2, 3, 4]]
        assert [await task for task in tasks] == [[10], [20], [30], [40]]

    on_clock(story)


def test_a_second_runner_starts_on_a_full_batch_at_once_and_on_less_only_after_a_while() -> None:
    async def story() -> None:
        world = World(runners=2, max_batch=3, spread_ms=20)
        tasks = [world.ask(Question(1))]
        await world.turn()
        tasks.append(world.ask(Question(2)))
        await world.advance(0.019)
        assert len(world.executor.held) == 1, "one by one they gather behind the first runner"
        await world.advance(0.0011)
        assert len(world.executor.held) == 2, "but not for longer than spread_ms"
        await world.settle()
        tasks.append(world.ask(Question(3)))
        await world.turn()
        tasks.append(world.ask(*questions(4, 5, 6)))
        await world.turn()
        assert len(world.executor.held) == 2, "a full batch does not wait"
        await world.settle()
        assert world.batches == [[1], [2], [3], [4, 5, 6]]
        assert [await task for task in tasks] == [[10], [20], [30], [40, 50, 60]]

    on_clock(story)


def test_a_full_queue_refuses_at_once_and_says_so() -> None:
    async def story() -> None:
        world = World(max_batch=2, max_queue=3)
        running = world.ask(*questions(1, 2))
        await world.turn()
        queued = world.ask(*questions(3, 4))
        await world.turn()
        answers = world.ask(Question(5), Question(6, "high"), Question(7))
        lost = await asyncio.wait_for(world.batcher.submit(questions(8, 9)), 1)
        assert [type(answer) for answer in lost] == [Overloaded, Overloaded]
        assert world.batcher.queued == 3
        await world.settle()
        first, high, third = await answers
        assert (type(first), high, type(third)) == (Overloaded, 60, Overloaded), "the high one took the room"
        assert (await running, await queued) == ([10, 20], [30, 40])
        assert world.batcher.counts.refused == 4

    on_clock(story)


def test_a_cancelled_group_gives_its_room_back_and_is_not_run() -> None:
    async def story() -> None:
        world = World(max_batch=2, max_queue=4)
        world.ask(*questions(1, 2))
        await world.turn()
        gone = world.ask(*questions(3, 4, 5))
        await world.turn()
        gone.cancel()
        await world.turn()
        assert world.batcher.queued == 0
        kept = world.ask(*questions(6, 7))
        await world.settle()
        assert world.batches == [[1, 2], [6, 7]]
        assert await kept == [60, 70]

    on_clock(story)


def test_draining_serves_what_was_accepted_and_refuses_the_rest() -> None:
    async def story() -> None:
        world = World(max_batch=2, wait_ms=1_000)
        accepted = world.ask(*questions(1, 2, 3))
        await world.turn()
        closing = asyncio.ensure_future(world.batcher.drain())
        await world.settle()
        assert await closing is True
        assert await accepted == [10, 20, 30]
        (refused,) = await world.batcher.submit([Question(4)])
        assert isinstance(refused, ModelUnavailable)

    on_clock(story)


def test_draining_gives_up_on_a_hung_engine_and_still_answers_everyone() -> None:
    async def story() -> None:
        world = World(max_batch=1, hang_ms=60_000)
        stuck = world.ask(*questions(1, 2))
        await world.turn()
        closing = asyncio.ensure_future(world.batcher.drain(timeout_s=3))
        await world.advance(4)
        assert await closing is False
        assert {type(answer) for answer in await stuck} == {ModelUnavailable}

    on_clock(story)


def test_a_batch_holds_one_version_and_order_within_each_is_kept() -> None:
    async def story() -> None:
        world = World(max_batch=4)
        world.ask(Question(0), key="a")
        await world.turn()
        tasks = [world.ask(Question(n), key="ab"[n % 2]) for n in range(1, 9)]
        await world.settle()
        assert world.batches == [[0], [1, 3, 5, 7], [2, 4, 6, 8]]
        assert [await task for task in tasks] == [[n * 10] for n in range(1, 9)]

    on_clock(story)


@pytest.mark.parametrize("runners", [1, 3])
async def test_in_real_threads_every_question_gets_its_own_answer(runners: int) -> None:
    batcher: Batcher[Question, int] = Batcher(
        [Lane(f"lane-{n}", lambda _, items: [item.number for item in items]) for n in range(runners)],
        BatcherLimits(max_batch=7, max_queue=10_000),
    )
    groups = [questions(*range(start, start + start % 23)) for start in range(300)]
    answers = await asyncio.gather(*(batcher.submit(group) for group in groups))
    assert answers == [[item.number for item in group] for group in groups]
    assert await batcher.drain()
    counts = batcher.counts
    assert counts.largest_batch == 7
    assert counts.answered == counts.items == sum(map(len, groups))
