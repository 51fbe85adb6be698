"""The path the stream takes, without a network: `Plane.rank` in the process that asks.

python -m infra.bench.serve.in_process REGISTRY RUNNERS LISTS; steps and results as `driver` says. It
does more than the servers do: it starts from packed histories and item ids, and ends with ordered
lists. The cache of encoded histories is off, as none of the others has one.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import uvloop

from compression.registry import Registry
from features.encoding import Vocabulary
from features.memory_store import MemoryStore
from features.sequence import NARROW, NARROW_EVENT
from features.settings import FeatureSettings
from features.statistics import ItemStatistics
from inference.errors import InferenceError
from inference.plane import Plane, Version
from inference.settings import InferenceSettings
from inference.types import RankRequest
from infra.bench.in_process import tune
from infra.bench.serve import payload
from infra.bench.serve.arms import BATCHES, HISTORIES, WIDTHS, our_lanes
from infra.bench.serve.driver import Done, drive
from infra.bench.serve.shape import CANDIDATES, HISTORY, MAX_LISTS

_NOW_S = 1_700_000_000


class InProcess:
    """Requests as groups, one a request, as the stream submits what it polled."""

    def __init__(self, plane: Plane, version: Version, groups: list[list[RankRequest]]) -> None:
        self._plane = plane
        self._version = version
        self._groups = groups
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
        answers = await self._plane.rank(self._groups[number % len(self._groups)], self._version)
        failed = any(isinstance(answer, InferenceError) for answer in answers)
        done(None if failed else b"")


def requests(rows: npt.NDArray[np.int32], vocabulary: Vocabulary) -> list[RankRequest]:
    """The lists of one request [lists, ROW], as the stream has them: ids for rows, in packed histories."""
    tensors = payload.tensors(rows)
    events = np.zeros((len(rows), HISTORY), NARROW_EVENT)
    events["item"] = vocabulary.item_ids[tensors["items"] - 1]
    category = vocabulary.category_ids[tensors["categories"] - 1]
    events["category_behavior"] = category | (tensors["behaviors"].astype(np.int64) - 1) << 30
    events["timestamp"] = _NOW_S + 60 * np.arange(HISTORY)
    candidates = vocabulary.item_ids[tensors["candidates"] - 1]
    return [
        RankRequest(user, bytes((NARROW, 0)) + history.tobytes(), CANDIDATES, tuple(asked))
        for user, (history, asked) in enumerate(zip(events, candidates.tolist(), strict=True))
    ]


async def main(registry: str, runners: int, lists: int) -> None:
    features = FeatureSettings()
    # The load asks the same few requests again and again: with a cache it would compute nothing.
    settings = InferenceSettings(
        lanes=our_lanes(runners),
        spares=0,
        max_batch=MAX_LISTS,
        cache_mb=0,
        batches=BATCHES,
        histories=HISTORIES,
        candidate_sizes=WIDTHS,
    )
    plane = Plane(settings, features, ItemStatistics(MemoryStore(), settings=features))
    version = await plane.open(Path(registry), "serving")
    vocabulary = Registry(registry).open().vocabulary()
    groups = [requests(rows, vocabulary) for rows in payload.requests(payload.Known.of(vocabulary), lists)]
    tune()
    try:
        await drive(InProcess(plane, version, groups), lists)
    finally:
        await plane.close()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
