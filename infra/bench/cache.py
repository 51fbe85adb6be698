"""`tailrace bench cache`: what an ask costs whose history is known, against the same ask encoded whole.

Two rankers of one released version on one engine, one with a cache and one without, are asked the same
in turn, and the CPU time of the process is taken. Statistics and histories are drawn from the version's
vocabulary, popular items more often. Every list is made as in service: encode, retrieve, find candidates,
score, select.

    ask               the history is as it was, and so are the candidates
    ask, others       the history is as it was, other candidates are scored
    click             it has one event more, of 100 at most, so the one event is appended
    click, full       100 events before and after: the window slides, and everything is encoded
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import numpy.typing as npt
import psutil

from compression.releases.registry import Registry
from features.encoding import Vocabulary
from features.memory_store import MemoryStore
from features.sequence import MAX_EVENTS, NARROW, NARROW_EVENT, pack_fence
from features.settings import FeatureSettings
from features.statistics import ItemStatistics
from features.store import Append
from inference.ranker import Ranker, Warmed
from inference.settings import InferenceSettings
from inference.types import RankedList, RankRequest
from inference.user_cache import UserCache
from infra.bench import options as bench_options
from infra.bench import report
from infra.commands import options

GOAL: Final = 0.5
USERS: Final = 256
BATCHES: Final = (1, 32)
WORKLOADS: Final = ("ask", "ask, others", "click", "click, full")
_START_S: Final = 1_700_000_000
_FIRST_EVENTS: Final = 60
_SEEN_EVENTS: Final = 20_000

# What the users ask in a round; round 0 fills the cache.
Asks = Callable[[int], list[RankRequest]]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cost:
    """One workload at one batch size: CPU per list, medians over the rounds."""

    workload: str
    batch: int
    without_us: float
    with_us: float
    ratios: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


class Arm:
    """A ranker on one engine."""

    def __init__(self, registry: Path, settings: InferenceSettings, seen: ItemStatistics) -> None:
        self._ranker = Ranker.open(registry, settings=settings)
        self._warmed: Warmed = self._ranker.warm(settings.engine, settings.engine_options())
        self._seen = seen

    @property
    def engine(self) -> str:
        return self._warmed.name

    def cpu_s(self, asks: Sequence[RankRequest], batch: int) -> float:
        """CPU time of the process for lists for all of them."""
        started_s = time.process_time()
        for start in range(0, len(asks), batch):
            answers = self._ranker.rank(self._warmed, asks[start : start + batch], self._seen)
            if not all(isinstance(answer, RankedList) for answer in answers):
                raise RuntimeError(f"an ask was not answered: {answers}")
        return time.process_time() - started_s

    def close(self) -> None:
        self._warmed.close()


def run(registry: Path, *, engine: str, rounds: int, seed: int) -> dict[str, Any]:
    """Every workload at every batch size, both arms in turn, `rounds` times."""
    artefact = Registry(registry).open()
    vocabulary = artefact.vocabulary()
    world = _World(vocabulary, seed)
    settings = InferenceSettings(engine=engine)
    without, cached = (
        Arm(registry, settings.model_copy(update={"cache_mb": cache_mb}), world.seen)
        for cache_mb in (0.0, settings.cache_mb)
    )
    before_bytes = psutil.Process().memory_info().rss
    costs = [
        _compare(without, cached, workload, batch, _asks(world, workload, rounds), rounds)
        for workload in WORKLOADS
        for batch in BATCHES
    ]
    user_bytes = UserCache.user_bytes(
        artefact.manifest.model, retrieved=settings.retrieved, listed=FeatureSettings().candidate_limit
    )
    measured = {
        "version": artefact.version,
        "engine": cached.engine,
        "appends": "append" in artefact.manifest.graphs,
        "items": len(vocabulary.item_ids),
        "users": USERS,
        "rounds": rounds,
        "seed": seed,
        "goal_ratio": GOAL,
        "cache_mb": settings.cache_mb,
        "cache_bytes_per_user": user_bytes,
        "cache_users_at_most": int(settings.cache_mb * 2**20 / user_bytes),
        "process_grew_mib": round((psutil.Process().memory_info().rss - before_bytes) / 2**20, 1),
        "costs": [{**asdict(cost), "ratio": cost.ratio} for cost in costs],
    }
    without.close()
    cached.close()
    return measured


def show(measured: dict[str, Any], *, json_path: Path | None) -> None:
    report.table(
        f"cache: CPU per list, {measured['engine']}, {measured['items']:,} items, histories up to "
        f"{MAX_EVENTS} events, {measured['rounds']} interleaved rounds of {measured['users']} users",
        ["workload", "batch", "without µs", "with µs", "ratio", "min", "max"],
        [
            [
                cost["workload"],
                str(cost["batch"]),
                f"{cost['without_us']:,.0f}",
                f"{cost['with_us']:,.0f}",
                f"{cost['ratio']:.2f}",
                f"{min(cost['ratios']):.2f}",
                f"{max(cost['ratios']):.2f}",
            ]
            for cost in measured["costs"]
        ],
    )
    report.note(
        f"{measured['cache_bytes_per_user'] / 1024:.0f} KiB per user, {measured['cache_users_at_most']} "
        f"users in {measured['cache_mb']:.0f} MiB, the process grew by {measured['process_grew_mib']} MiB; "
        f"goal: an ask costs at most {GOAL} of one without a cache"
    )
    if not measured["appends"]:
        report.note("this version was released without the append graph: a click is encoded whole")
    report.write(json_path, "cache", measured)


def held(measured: dict[str, Any]) -> bool:
    """Whether an ask with a warm cache costs at most the goal."""
    return all(cost["ratio"] <= GOAL for cost in measured["costs"] if cost["workload"] == "ask")


@click.command()
@click.option("--rounds", type=click.IntRange(2, MAX_EVENTS - _FIRST_EVENTS), default=15, show_default=True)
@click.option("--engine", default="auto", show_default=True)
@options.registry
@bench_options.seed
@bench_options.json_path
def cache(*, rounds: int, engine: str, registry: Path, seed: int, json_path: Path | None) -> None:
    """CPU per list with a warm cache of encoded histories and without, on the same asks, in turn.

    \b
    tailrace bench cache
    tailrace bench cache --engine openvino --json cache.json
    """
    measured = run(registry, engine=engine, rounds=rounds, seed=seed)
    show(measured, json_path=json_path)
    if not held(measured):
        raise click.ClickException("the promise did not hold: see the table")


class _World:
    """Statistics, and the events of users, drawn from a vocabulary."""

    def __init__(self, vocabulary: Vocabulary, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._vocabulary = vocabulary
        self._order = self._rng.permutation(len(vocabulary.item_ids))
        self.seen = asyncio.run(self._statistics())

    def events(self, users: int, count: int) -> npt.NDArray[Any]:
        """Packed events [users, count], minutes to hours apart."""
        made = np.zeros((users, count), NARROW_EVENT)
        made["item"], made["category_behavior"] = self._draw((users, count))
        made["timestamp"] = _START_S + np.cumsum(self._rng.integers(60, 7_200, (users, count)), axis=1)
        return made

    def _draw(self, shape: int | tuple[int, int]) -> tuple[Int64, Int64]:
        """Items and their categories."""
        vocabulary, known = self._vocabulary, len(self._vocabulary.item_ids)
        places = self._order[np.minimum(self._rng.zipf(1.2, shape), known) - 1]
        categories = np.minimum(vocabulary.item_categories[places], len(vocabulary.category_ids)) - 1
        return vocabulary.item_ids[places], vocabulary.category_ids[categories]

    async def _statistics(self) -> ItemStatistics:
        store = MemoryStore()
        seen = ItemStatistics(store)
        items, categories = self._draw(_SEEN_EVENTS)
        users = self._rng.integers(1, 1 + _SEEN_EVENTS // 40, _SEEN_EVENTS)
        columns = zip(users.tolist(), items.tolist(), categories.tolist(), strict=True)
        appends = [
            Append(user, item, category, 0, _START_S - _SEEN_EVENTS + place, 1, 0, place)
            for place, (user, item, category) in enumerate(columns)
        ]
        for start in range(0, _SEEN_EVENTS, 500):
            some = appends[start : start + 500]
            appended, _ = await store.append(some)
            seen.observe(some, appended)
            await seen.flush()
        await seen.refresh()
        return seen


def _asks(world: _World, workload: str, rounds: int) -> Asks:
    made = world.events(USERS, MAX_EVENTS + rounds)

    def asks(number: int) -> list[RankRequest]:
        start, end = {
            "ask": (0, MAX_EVENTS),
            "ask, others": (0, MAX_EVENTS),
            "click": (0, _FIRST_EVENTS + number),
            "click, full": (number, MAX_EVENTS + number),
        }[workload]
        header = bytes((NARROW, 1)) + pack_fence(1, 0, number)
        # What is excluded makes room for others: three items of the history, other ones each time.
        first = MAX_EVENTS - 2 * number - 3
        excluded = made["item"][:, first : first + (3 if workload == "ask, others" else 0)]
        return [
            RankRequest(
                user, header + made[user, start:end].tobytes(), exclude=tuple(excluded[user].tolist())
            )
            for user in range(USERS)
        ]

    return asks


def _compare(without: Arm, cached: Arm, workload: str, batch: int, asks: Asks, rounds: int) -> Cost:
    for arm in (without, cached):
        arm.cpu_s(asks(0), batch)
    taken: list[tuple[float, float]] = []
    for number in range(1, rounds + 1):
        asked = asks(number)
        # Who goes first changes from round to round.
        if number % 2:
            without_s, with_s = without.cpu_s(asked, batch), cached.cpu_s(asked, batch)
        else:
            with_s, without_s = cached.cpu_s(asked, batch), without.cpu_s(asked, batch)
        taken.append((without_s / USERS, with_s / USERS))
    return Cost(
        workload=workload,
        batch=batch,
        without_us=round(statistics.median(plain_s for plain_s, _ in taken) * 1e6, 1),
        with_us=round(statistics.median(ours_s for _, ours_s in taken) * 1e6, 1),
        ratios=[round(ours_s / plain_s, 3) for plain_s, ours_s in taken],
    )
