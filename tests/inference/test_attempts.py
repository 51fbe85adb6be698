"""Batches that fail, with runs that the test finishes."""

from __future__ import annotations

from inference.errors import EngineFailed
from tests.inference.batcher_world import Question, World, on_clock, questions


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
