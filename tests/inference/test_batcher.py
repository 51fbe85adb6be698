"""The batcher on a loop whose clock the test moves, with runs that the test finishes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import uvloop

from inference.batcher import Batcher, BatcherLimits
from inference.dispatcher import Lane
from inference.errors import DeadlineExceeded, EngineFailed, InferenceError, ModelUnavailable, Overloaded
from inference.profile import LatencyProfile
from inference.types import Priority


@dataclass(frozen=True)
class Question:
    number: int
    priority: Priority = "normal"
    deadline_s: float | None = None
    tier: int = 1


class ClockLoop(asyncio.SelectorEventLoop):
    now_s = 100.0

    def time(self) -> float:
        return self.now_s


class HeldExecutor(Executor):
    """Keeps what it is given until `finish`; nothing runs by itself."""

    def __init__(self) -> None:
        self.held: list[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.held.append((future, fn, args))
        return future

    def finish(self) -> None:
        future, fn, args = self.held.pop(0)
        try:
            future.set_result(fn(*args))
        except Exception as error:  # noqa: BLE001  # as an executor does
            future.set_exception(error)


class World:
    def __init__(
        self, run: Callable[[list[Question]], list[Any]] | None = None, runners: int = 1, **limits: Any
    ) -> None:
        self.batches: list[list[int]] = []
        self.ran_on: list[int] = []
        self.broken: dict[int, Callable[[list[Question]], list[Any]]] = {}
        self.executor = HeldExecutor()
        self._run = run or (lambda items: [item.number * 10 for item in items])
        self.lanes = [
            Lane(
                f"lane-{number}",
                partial(self.run, number),
                new_thread=lambda _: self.executor,
                profile=LatencyProfile({1: 0.02, 64: 0.02}),
            )
            for number in range(runners)
        ]
        self.batcher: Batcher[Question, int] = Batcher(self.lanes, BatcherLimits(**limits))
        self.loop = asyncio.get_running_loop()

    def run(self, lane: int, key: Any, items: list[Question]) -> list[Any]:
        self.batches.append([item.number for item in items])
        self.ran_on.append(lane)
        return self.broken[lane](items) if lane in self.broken else self._run(items)

    def ask(self, *items: Question, key: Any = None) -> asyncio.Task[list[int | InferenceError]]:
        return asyncio.ensure_future(self.batcher.submit(items, key))

    async def turn(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def advance(self, seconds: float) -> None:
        assert isinstance(self.loop, ClockLoop)
        await self.turn()
        self.loop.now_s += seconds
        await self.turn()

    async def finish(self) -> None:
        self.executor.finish()
        await self.turn()

    async def settle(self) -> None:
        await self.turn()
        while self.executor.held:
            await self.finish()


def on_clock(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=ClockLoop) as runner:
        runner.run(asyncio.wait_for(story(), 1_000))


def questions(*numbers: int, **fields: Any) -> list[Question]:
    return [Question(number, **fields) for number in numbers]


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


def test_an_item_that_poisons_its_batch_fails_alone() -> None:
    def run(items: list[Question]) -> list[int]:
        if any(item.number == 13 for item in items):
            raise ValueError("thirteen")
        return [item.number for item in items]

    async def story() -> None:
        world = World(run, max_batch=32)
        asked = world.ask(*questions(*range(32)))
        await world.settle()
        answers = await asked
        poisoned = answers.pop(13)
        assert isinstance(poisoned, EngineFailed)
        assert "thirteen" in str(poisoned)
        assert answers == [number for number in range(32) if number != 13]
        assert (world.batcher.counts.failed, world.batcher.counts.answered) == (1, 31)

    on_clock(story)


def test_an_engine_that_fails_at_everything_is_not_asked_for_ever() -> None:
    def run(items: list[Question]) -> list[int]:
        raise RuntimeError("out of order")

    async def story() -> None:
        world = World(run, max_batch=32)
        asked = world.ask(*questions(*range(32)))
        await world.settle()
        assert {type(answer) for answer in await asked} == {EngineFailed}
        assert len(world.batches) <= 17

    on_clock(story)


def test_an_answer_too_few_fails_the_batch_instead_of_shifting_answers() -> None:
    async def story() -> None:
        world = World(lambda items: [item.number for item in items][1:])
        asked = world.ask(*questions(1, 2, 3))
        await world.settle()
        assert {type(answer) for answer in await asked} == {EngineFailed}

    on_clock(story)


def test_failures_that_an_engine_returns_are_handed_on_in_place() -> None:
    async def story() -> None:
        world = World(lambda items: [EngineFailed("nan") if item.number == 2 else 1 for item in items])
        asked = world.ask(*questions(1, 2, 3))
        await world.settle()
        first, second, third = await asked
        assert (first, type(second), third) == (1, EngineFailed, 1)

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

        def probe() -> None:
            if not well:
                raise RuntimeError("still ill")

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
