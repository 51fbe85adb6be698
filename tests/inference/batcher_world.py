"""A batcher on a loop whose clock the test moves, with runs that the test finishes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from inference.batcher import Batcher, BatcherLimits
from inference.dispatcher import Lane
from inference.errors import InferenceError
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
