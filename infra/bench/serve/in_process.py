"""The path the stream takes, without a network: `Plane.rank` in the process that asks.

python -m infra.bench.serve.in_process REGISTRY SESSIONS LISTS CACHE_MB PART PARTS. One of several processes
with one lane each, as `tailrace worker --workers` has them: its users are its own, as those of a partition
are, and of the candidates it lists as many as the stream does. The first line it writes says how far its
scores lie from ONNX Runtime's; steps and results follow as `driver` says. It does more than the servers do:
it starts from packed histories and item ids, and ends with ordered lists.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import uvloop

from compression.releases.registry import Registry
from features.memory_store import MemoryStore
from features.settings import FeatureSettings
from features.statistics import ItemStatistics
from inference.errors import InferenceError
from inference.plane import Plane, Version
from inference.settings import InferenceSettings
from inference.types import RankedList, RankRequest
from infra.bench.in_process import tune
from infra.bench.serve import payload
from infra.bench.serve.arms import BATCHES, HISTORIES, WIDTHS, our_lanes
from infra.bench.serve.driver import Done, drive
from infra.bench.serve.parity import COMPARED, difference, expected_scores
from infra.bench.serve.sessions import Sessions
from infra.bench.serve.shape import CANDIDATES, MAX_LISTS
from stream.settings import StreamSettings

LISTED: Final = StreamSettings().k


class InProcess:
    """What is due in one turn of the loop in one group, as the stream submits what it polled.

    Asked for over again, they are those of other users, whom a cache does not know."""

    def __init__(self, plane: Plane, version: Version, sessions: Sessions, lists: int) -> None:
        self._plane = plane
        self._version = version
        self._lists = lists
        self._users = sessions.users.tolist()
        self._sequences = list(sessions.sequences())
        self._candidates = [tuple(asked) for asked in sessions.candidates.tolist()]
        self._again = sessions.again
        self._due: list[tuple[int, Done]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def requests(self, number: int, k: int = LISTED) -> list[RankRequest]:
        turn, place = divmod(number, len(self._users) // self._lists)
        return [
            RankRequest(
                self._users[at] + turn * self._again,
                self._sequences[at],
                k,
                self._candidates[at],
            )
            for at in range(place * self._lists, (place + 1) * self._lists)
        ]

    async def visit(self) -> None:
        """Lists for users who are not seen again, until the cache has no memory left that was never used:
        what it then costs is what it costs for good."""
        place, users = 0, -1
        while self._version.ranker.users > users:
            users = self._version.ranker.users
            asked = [
                RankRequest(
                    -1 - at, self._sequences[at % len(self._sequences)], candidates=self._candidates[0]
                )
                for at in range(place, place + MAX_LISTS)
            ]
            await self._plane.rank(asked, self._version)
            place += MAX_LISTS

    async def scores(self, number: int) -> payload.Float32:
        """[lists, CANDIDATES] in the order asked; without a score where there is no answer."""
        asked = self.requests(number, CANDIDATES)
        answers = await self._plane.rank(asked, self._version)
        return np.array(
            [
                [found.get(item, np.nan) for item in one.candidates or ()]
                for one, found in zip(asked, map(_scores_of, answers), strict=True)
            ],
            np.float32,
        )

    def send(self, number: int, done: Done) -> None:
        if not self._due:
            asyncio.get_running_loop().call_soon(self._submit)
        self._due.append((number, done))

    def _submit(self) -> None:
        due, self._due = self._due, []
        task = asyncio.get_running_loop().create_task(self._ask(due))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def ready(self) -> None:
        """Nothing ends by itself."""

    async def reset(self) -> None:
        self.close()
        await asyncio.sleep(0.05)

    def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()

    async def _ask(self, due: Sequence[tuple[int, Done]]) -> None:
        asked = [one for number, _ in due for one in self.requests(number)]
        answers = await self._plane.rank(asked, self._version)
        for place, (_, done) in enumerate(due):
            own = answers[place * self._lists : (place + 1) * self._lists]
            done(None if any(isinstance(answer, InferenceError) for answer in own) else b"")


def _scores_of(answer: RankedList | InferenceError) -> dict[int, float]:
    return {} if isinstance(answer, InferenceError) else dict(zip(answer.items, answer.scores, strict=True))


async def main(registry: str, sessions_file: str, lists: str, cache_mb: str, part: str, parts: str) -> None:
    features = FeatureSettings()
    # The other arms have the network alone: nothing is counted there.
    settings = InferenceSettings(
        fusion=0.0,
        lanes=our_lanes(1),
        spares=0,
        max_batch=MAX_LISTS,
        cache_mb=float(cache_mb),
        batches=BATCHES,
        histories=HISTORIES,
        candidate_sizes=WIDTHS,
    )
    plane = Plane(settings, features, ItemStatistics(MemoryStore(), settings=features))
    version = await plane.open(Path(registry), "serving")
    sessions = Sessions.load(Path(sessions_file)).of(int(part), int(parts))
    sender = InProcess(plane, version, sessions, int(lists))
    if settings.cache_mb:
        await sender.visit()
    await _compare(sender, registry, sessions.requests(int(lists))[:COMPARED])
    tune()
    try:
        await drive(sender, int(lists))
    finally:
        await plane.close()


async def _compare(sender: InProcess, registry: str, requests: Sequence[payload.Int32]) -> None:
    answers = [await sender.scores(number) for number in range(len(requests))]
    found = difference(answers, expected_scores(Registry(registry).open(), requests))
    sys.stdout.write(json.dumps({"difference": found}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
