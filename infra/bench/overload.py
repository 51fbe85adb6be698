"""`tailrace bench overload`: more asks than can be ranked, from users of three tiers.

Requests go through the request path of a worker (admission, plane, degraded lists) with memory in
place of Kafka and Redis, each when it is due.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import click
import numpy as np
import numpy.typing as npt
import psutil

from features.memory_store import MemoryStore
from features.settings import FeatureSettings
from features.statistics import ItemStatistics
from features.store import User
from inference.admission.control import Admission
from inference.admission.load import LoadProbe
from inference.admission.settings import AdmissionSettings
from inference.plane import Plane
from inference.releases.serving import ServingModel
from inference.settings import InferenceSettings
from infra.bench import options as bench_options
from infra.bench import report
from infra.bench.in_process import prepare, run_on_uvloop, tune
from infra.bench.load import poisson
from stream.delivery import Record
from stream.metrics import StreamMetrics
from stream.recommend import RequestPath
from stream.resources import admission_of
from stream.settings import StreamSettings
from stream.work import Unit
from topics.codec import encode, record_key
from topics.messages import BehaviorEvent, RecommendRequest

TIERS: Final = ("free", "standard", "premium")
SHARES: Final = (0.5, 0.35, 0.15)
LATE_S: Final = 0.005
SETTLE_S: Final = 3.0
TOPIC: Final = "recommendation-requests"
CAPACITY_ASKS: Final = 12_800
CAPACITY_ROUNDS: Final = 3
UNIT: Final = 64
UNITS_AT_ONCE: Final = 8
POLL_S: Final = 0.005  # a fetch from Kafka takes about as long, and brings what came meanwhile

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request on its way in, as the request path reads records."""

    offset: int
    key: bytes
    value: bytes
    topic: str = TOPIC
    partition: int = 0
    headers: Sequence[tuple[str, bytes | None]] = ()
    timestamp: int = 0


class Users(MemoryStore):
    """Sequences as a log's users have them, and tiers drawn by share; read as one round trip would be."""

    def __init__(self, sequences: dict[int, bytes], tiers: dict[int, str]) -> None:
        super().__init__()
        self._known = sequences
        self._tier_of = tiers

    async def read(self, user_ids: Sequence[int]) -> list[User]:
        return [User(self._known.get(user), self._tier_of[user]) for user in user_ids]


class Answers:
    """Where lists go in place of Kafka: when each came, and whether it was degraded."""

    def __init__(self) -> None:
        self.expect(0)

    def expect(self, count: int) -> None:
        """Begin anew, with requests numbered from 0."""
        self.arrived_s = np.full(count, np.nan)
        self.degraded = np.zeros(count, np.bool_)

    async def send(self, topic: str, records: Sequence[Record]) -> None:
        now_s = asyncio.get_running_loop().time()
        for record in records:
            # Not parsed: what the bench takes of the interpreter is missing to what it measures.
            value = record.value or b""
            number = int(value.partition(b'"request_id":"')[2].partition(b'"')[0])
            self.arrived_s[number] = now_s
            self.degraded[number] = b'"degraded":"' in value


@dataclass(frozen=True, slots=True)
class TierResult:
    """Of one tier at one load."""

    tier: str
    asked: int
    ranked: int
    degraded: int
    ranked_p50_ms: float
    ranked_p99_ms: float


@dataclass(frozen=True, slots=True)
class Result:
    """One load. `late`: answered more than 5 ms past the deadline, degraded or not."""

    load: float
    asked_per_s: float
    ranked_per_s: float
    unanswered: int
    late: int
    worst_past_deadline_ms: float
    memory_growth_mb: float
    tiers: list[TierResult] = field(default_factory=list)


class Worker:
    """The part of a worker between Kafka and Kafka."""

    def __init__(
        self, registry: Path, requests: dict[int, bytes], tiers: dict[int, str], deadline_ms: int
    ) -> None:
        self.stream = StreamSettings(
            instance_id="overload",
            registry=str(registry),
            click_deadline_ms=deadline_ms,
            max_in_flight=100_000,
        )
        self.metrics = StreamMetrics()
        self.store = Users(requests, tiers)
        self.alike = Users(requests, dict.fromkeys(tiers, TIERS[0]))
        self.admission = admission_of(self.stream, AdmissionSettings(shared=False))
        self.answers = Answers()

    async def open(self, statistics: ItemStatistics) -> None:
        self.plane = Plane(InferenceSettings(engine="onnx"), FeatureSettings(), statistics)
        self.model = ServingModel(self.plane, self.stream.releases, self.metrics.releases)
        if not await self.model.load():  # without a version a worker's lists are of what is popular
            raise click.ClickException("; ".join(self.model.describe()["refused"].values()))
        self.path = self._path(statistics, self.admission, self.store)
        # What is shed takes no engine, and who goes before others makes batches smaller: capacity is what
        # there is where nobody is shed and all are alike.
        everybody = admission_of(self.stream, AdmissionSettings(shared=False, adaptive=False))
        self.open_path = self._path(statistics, everybody, self.alike)
        self._probing = asyncio.create_task(LoadProbe(self.admission, self.metrics).run())

    def _path(self, statistics: ItemStatistics, admission: Admission, store: Users) -> RequestPath:
        return RequestPath(
            store=store,
            statistics=statistics,
            ranking=self.model,
            admission=admission,
            results=self.answers,
            dead_letters=self.answers,
            settings=self.stream,
            metrics=self.metrics,
        )

    async def close(self) -> None:
        self._probing.cancel()
        await self.model.close()


async def measure(
    events: Sequence[BehaviorEvent],
    *,
    registry: Path,
    loads: Sequence[float],
    seconds: float,
    deadline_ms: int,
    seed: int,
    say: Callable[[str], None],
) -> tuple[list[Result], float]:
    requests, statistics = await prepare(events)
    rng = np.random.default_rng(seed)
    sequences = {request.user_id: request.sequence or b"" for request in requests}
    users = np.array(list(sequences))
    tiers = dict(zip(users.tolist(), rng.choice(TIERS, len(users), p=SHARES).tolist(), strict=True))
    worker = Worker(registry, sequences, tiers, deadline_ms)
    await worker.open(statistics)
    tune()

    most = float(np.median([await _capacity(worker, users.tolist()) for _ in range(CAPACITY_ROUNDS)]))
    results = []
    for load in loads:
        say(f"{load:.0%} of {most:,.0f} asks/s for {seconds:g} s")
        asking = rng.choice(users, int(most * load * seconds)).tolist()
        results.append(await _one(worker, asking, tiers, load, most * load, deadline_ms, seconds, seed))
    await worker.close()
    return results, most


async def _capacity(worker: Worker, users: Sequence[int]) -> float:
    """Lists a second, decoding and replying included, when there is always something to read and nothing
    is shed."""
    records = _records([users[number % len(users)] for number in range(CAPACITY_ASKS)], 10_000)
    worker.answers.expect(len(records))
    loop = asyncio.get_running_loop()
    room = asyncio.Semaphore(UNITS_AT_ONCE)
    began_s = loop.time()
    for first in range(0, len(records), UNIT):
        await room.acquire()
        unit = Unit(TOPIC, 1, records[first : first + UNIT], loop.time(), room.release)
        await worker.open_path.requests(unit)
    for _ in range(UNITS_AT_ONCE):
        await room.acquire()
    return int((~worker.answers.degraded).sum()) / (loop.time() - began_s)


def _records(users: Sequence[int], deadline_ms: int) -> list[Asked]:
    """All of a run's, made beforehand and kept from the collector of garbage: a worker has but a few at a
    time."""
    records = [
        Asked(
            number,
            record_key(user),
            encode(RecommendRequest(request_id=str(number), user_id=user, deadline_ms=deadline_ms))[0],
        )
        for number, user in enumerate(users)
    ]
    gc.collect()
    gc.freeze()
    return records


async def _one(
    worker: Worker,
    asking: Sequence[int],
    tiers: dict[int, str],
    load: float,
    rate: float,
    deadline_ms: int,
    seconds: float,
    seed: int,
) -> Result:
    loop = asyncio.get_running_loop()
    answers = worker.answers
    answers.expect(len(asking))
    records = _records(asking, deadline_ms)
    due_s = poisson(len(records), rate, seed)
    process = psutil.Process()
    memory: list[float] = []
    began_s = loop.time() + 0.1
    number, noted_s = 0, 0.0
    while number < len(records):
        now_s = loop.time() - began_s
        ready = int(np.searchsorted(due_s, now_s, side="right"))
        if ready > number:
            # What is due is handed over with the time at which it was due: waiting for us is waiting.
            unit = Unit(TOPIC, 1, records[number:ready], began_s + float(due_s[number]), _nothing)
            await worker.path.requests(unit)
            number = ready
            await asyncio.sleep(POLL_S)
        else:
            await asyncio.sleep(max(POLL_S, due_s[number] - now_s))
        if now_s - noted_s > seconds / 20:
            noted_s = now_s
            memory.append(process.memory_info().rss / 2**20)
    await asyncio.sleep(SETTLE_S)
    took_s = answers.arrived_s - began_s - due_s
    past_s = took_s - deadline_ms / 1000
    tier_of = np.array([tiers[user] for user in asking])
    ranked = ~answers.degraded & ~np.isnan(took_s)
    half = len(memory) // 2
    return Result(
        load=load,
        asked_per_s=round(rate, 1),
        ranked_per_s=round(float(ranked.sum()) / seconds, 1),
        unanswered=int(np.isnan(took_s).sum()),
        late=int((past_s > LATE_S).sum()),
        worst_past_deadline_ms=round(float(np.nanmax(past_s)) * 1e3, 1),
        memory_growth_mb=round(float(np.median(memory[half:]) - np.median(memory[:half])), 1),
        tiers=[_tier(name, tier_of == name, ranked, took_s) for name in TIERS],
    )


def _nothing() -> None:
    """Nobody waits for a unit here."""


def _tier(
    name: str, mine: npt.NDArray[np.bool_], ranked: npt.NDArray[np.bool_], took_s: Float64
) -> TierResult:
    of_it = took_s[mine & ranked]
    percentile = partial(np.percentile, of_it) if len(of_it) else (lambda _: float("nan"))
    return TierResult(
        tier=name,
        asked=int(mine.sum()),
        ranked=len(of_it),
        degraded=int((mine & ~ranked).sum()),
        ranked_p50_ms=round(float(percentile(50)) * 1e3, 2),
        ranked_p99_ms=round(float(percentile(99)) * 1e3, 2),
    )


@click.command(name="overload")
@click.option("--seconds", type=click.FloatRange(2, 600), default=60.0, show_default=True, help="Per load.")
@click.option("--deadline-ms", type=click.IntRange(10, 10_000), default=200, show_default=True)
@bench_options.ranking(clicks=20_000)
def overload(
    *,
    seconds: float,
    deadline_ms: int,
    clicks: int,
    log: Path | None,
    registry: Path,
    seed: int,
    json_path: Path | None,
) -> None:
    """Asks at 50 % and at 150 % of capacity, from free, standard and premium users.

    Shown per tier: how many were ranked, how many had a degraded list at once, the ranked ones' p50 and
    p99; and in all: unanswered, more than 5 ms late, memory from the first to the second half.

    \b
    tailrace bench overload
    tailrace bench overload --seconds 10 --json overload.json
    """
    events, name = bench_options.events(log, clicks, seed)
    started_s = time.perf_counter()
    results, most = run_on_uvloop(
        measure(
            events,
            registry=registry,
            loads=(0.5, 1.5),
            seconds=seconds,
            deadline_ms=deadline_ms,
            seed=seed,
            say=partial(click.echo, err=True),
        )
    )
    report.table(
        f"capacity {most:,.0f} lists/s, deadline {deadline_ms} ms: {name}",
        ["load", "tier", "asked", "ranked", "degraded", "p50", "p99"],
        [
            [
                f"{result.load:.0%}",
                tier.tier,
                f"{tier.asked:,}",
                f"{tier.ranked:,}",
                f"{tier.degraded:,}",
                f"{tier.ranked_p50_ms:.1f} ms",
                f"{tier.ranked_p99_ms:.1f} ms",
            ]
            for result in results
            for tier in reversed(result.tiers)
        ],
    )
    top = [result.tiers[-1].ranked_p99_ms for result in results]
    for result in results:
        report.note(
            f"{result.load:.0%}: {result.ranked_per_s:,.0f} ranked/s, unanswered {result.unanswered}, over "
            f"5 ms late {result.late} (worst {result.worst_past_deadline_ms:.1f} ms past the deadline), "
            f"memory {result.memory_growth_mb:+.1f} MiB from half to half"
        )
    report.note(f"premium p99 at 150 % is {top[1] / top[0]:.2f} times that at 50 %")
    report.write(
        json_path,
        "overload",
        {
            "log": name,
            "seed": seed,
            "seconds": seconds,
            "deadline_ms": deadline_ms,
            "capacity_lists_per_s": round(most, 1),
            "premium_p99_ratio": round(top[1] / top[0], 3),
            "took_s": round(time.perf_counter() - started_s, 1),
            "loads": [asdict(result) for result in results],
        },
    )
