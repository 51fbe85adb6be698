"""The path the stream takes, without a network: batcher and engine in the process that asks.

python -m infra.bench.serve.in_process REGISTRY RUNNERS LISTS; steps and results as `driver` says.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import uvloop

from compression.registry import ModelShape, Registry
from inference import engines
from inference.batcher import Batcher, BatcherLimits, Run
from inference.buckets import BATCHES, fit, pad_rows
from inference.engines.base import Engine, EngineOptions, Shape
from inference.errors import InferenceError
from inference.types import Priority
from infra.bench.serve import payload
from infra.bench.serve.driver import Done, drive
from infra.bench.serve.shape import CANDIDATES, HISTORY, MAX_LISTS

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Asked:
    """One list: a row as `payload` makes them."""

    row: Int32
    priority: Priority = "normal"
    deadline_s: float | None = None


class InProcess:
    """Requests as groups of a batcher, one group a request, as the stream submits a unit."""

    def __init__(self, registry: Registry, *, runners: int, lists: int) -> None:
        artefact = registry.open()
        self.model: ModelShape = artefact.manifest.model
        self._pool = [engines.create("onnx", EngineOptions(threads=1)) for _ in range(runners)]
        for engine in self._pool:
            engine.load(artefact, ("rank",))
            engine.warm_up(Shape("rank", batch, HISTORY, CANDIDATES) for batch in BATCHES)
        self._batcher: Batcher[Asked, Float32] = Batcher(
            [_runner(engine) for engine in self._pool], BatcherLimits(max_batch=MAX_LISTS)
        )
        self._groups = [[Asked(row) for row in rows] for rows in payload.requests(self.model, lists)]
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, number: int, done: Done) -> None:
        task = asyncio.get_running_loop().create_task(self._ask(number, done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def reset(self) -> None:
        self.close()
        await asyncio.sleep(0.05)

    def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()

    async def _ask(self, number: int, done: Done) -> None:
        answers = await self._batcher.submit(self._groups[number % len(self._groups)])
        failed = any(isinstance(answer, InferenceError) for answer in answers)
        done(None if failed else np.stack([np.asarray(answer) for answer in answers]).tobytes())


def _runner(engine: Engine) -> Run[Asked, Float32]:
    def run(asked: list[Asked]) -> Sequence[Float32]:
        rows = np.stack([one.row for one in asked])
        padded = pad_rows(rows, fit(BATCHES, len(rows)))
        return list(engine.run("rank", payload.tensors(padded))["scores"][: len(rows)])

    return run


async def main(registry: str, runners: int, lists: int) -> None:
    await drive(InProcess(Registry(registry), runners=runners, lists=lists), lists)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
