"""`tailrace bench batching`: ways to wait for company, under the same load on the same engines."""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click
import numpy as np

from features.settings import FeatureSettings
from inference.plane import Plane
from inference.settings import InferenceSettings
from inference.types import RankRequest
from inference.waiting import Gather, Queue
from infra.bench import options as bench_options
from infra.bench import report
from infra.bench.in_process import capacity, drive, prepare, run_on_uvloop, tune
from infra.bench.load import poisson
from topics.messages import BehaviorEvent


class Deferred:
    """Leave as late as the target latency allows (Symphony, arXiv 2308.07470): batches grow as large as they
    may, whether or not an engine is idle."""

    def __init__(self, target_s: float) -> None:
        self._target_s = target_s

    def ripe_s(self, queue: Queue) -> float:
        return queue.oldest_s + self._target_s - queue.predicted_s(queue.queued)

    def observe(self, items: int, waited_s: float, took_s: float) -> None:
        """Its dispatcher's profile has learned already."""


class Regression:
    """Wait while one more item is worth it, by a line fitted to the last batches (as BentoML's dispatcher):
    duration = a·n + b, and n·(waited + next arrival + a) ≤ 0.95·mean wait of late."""

    _KEPT: Final = 50
    _TICK_S: Final = 0.001

    def __init__(self) -> None:
        self._batches: deque[tuple[int, float, float]] = deque(maxlen=self._KEPT)
        self._a_s, self._wait_s = 0.0, 0.0

    def ripe_s(self, queue: Queue) -> float:
        waited_s = queue.now_s - queue.oldest_s
        worth = queue.queued * (waited_s + self._TICK_S + self._a_s) <= 0.95 * self._wait_s
        return queue.now_s + self._TICK_S if worth else queue.now_s

    def observe(self, items: int, waited_s: float, took_s: float) -> None:
        self._batches.append((items, waited_s, took_s))
        sizes, waits_s, durations_s = np.array(self._batches).T
        spread = sizes.var()
        self._a_s = float(np.cov(sizes, durations_s, bias=True)[0, 1] / spread) if spread else 0.0
        self._wait_s = float(waits_s.mean())


POLICIES: dict[str, Any] = {
    "gather (kept)": Gather,
    "idle: at once": lambda: Gather(0.0, 0.0),
    "fixed 5 ms": lambda: Gather(0.005, 0.005),
    "deferred, target 20 ms": lambda: Deferred(0.020),
    "regression": Regression,
}


@dataclass(frozen=True, slots=True)
class Result:
    """One policy at one load, all rounds together."""

    policy: str
    load: float
    p50_ms: float
    p99_ms: float
    cpu_ms_per_list: float
    unanswered: int


async def measure(
    events: Sequence[BehaviorEvent],
    *,
    registry: Path,
    loads: Sequence[float],
    seconds: float,
    rounds: int,
    seed: int,
) -> tuple[list[Result], float]:
    requests, statistics = await prepare(events)
    plane = Plane(InferenceSettings(engine="onnx", spares=0), FeatureSettings(), statistics)
    version = await plane.open(registry, "serving")
    batcher = plane.batcher
    tune()

    async def ask(group: Sequence[RankRequest]) -> Any:
        return await plane.rank(group, version)

    most = await capacity(ask, requests, seconds=4.0)
    taken: dict[tuple[str, float], list[tuple[Any, float]]] = {}
    for number in range(rounds):
        for load in loads:
            for name, policy in POLICIES.items():
                batcher.waiting = policy()
                due_s = poisson(int(most * load * seconds), most * load, seed + number)
                before_s = _cpu_s()
                outcomes = await drive(ask, requests, due_s)
                taken.setdefault((name, load), []).append((outcomes, _cpu_s() - before_s))
    await plane.close()
    results = []
    for (name, load), rounds_of in taken.items():
        took_s = np.concatenate([outcomes.took_s for outcomes, _ in rounds_of])
        cpu_s = sum(spent_s for _, spent_s in rounds_of)
        results.append(
            Result(
                policy=name,
                load=load,
                p50_ms=round(float(np.nanpercentile(took_s, 50) * 1e3), 2),
                p99_ms=round(float(np.nanpercentile(took_s, 99) * 1e3), 2),
                cpu_ms_per_list=round(cpu_s / len(took_s) * 1e3, 3),
                unanswered=int(np.isnan(took_s).sum()),
            )
        )
    return results, most


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@click.command(name="batching")
@click.option("--seconds", type=click.FloatRange(1, 300), default=6.0, show_default=True, help="Per arm.")
@click.option("--rounds", type=click.IntRange(1, 20), default=2, show_default=True)
@bench_options.ranking(clicks=20_000)
def batching(
    *,
    seconds: float,
    rounds: int,
    clicks: int,
    log: Path | None,
    registry: Path,
    seed: int,
    json_path: Path | None,
) -> None:
    """Ways to wait for a fuller batch, at 10, 40 and 80 % of capacity, interleaved: p50, p99, CPU per list.

    \b
    tailrace bench batching
    tailrace bench batching --rounds 5 --json batching.json
    """
    loads = (0.1, 0.4, 0.8)
    events, name = bench_options.events(log, clicks, seed)
    results, most = run_on_uvloop(
        measure(events, registry=registry, loads=loads, seconds=seconds, rounds=rounds, seed=seed)
    )
    report.table(
        f"waiting for company, capacity {most:,.0f} lists/s: {name}",
        ["policy", *(f"{load:.0%}: p50" for load in loads), *(f"{load:.0%}: p99" for load in loads)]
        + [f"{load:.0%}: CPU ms" for load in loads],
        [
            [
                policy,
                *(f"{_at(results, policy, load).p50_ms:.1f}" for load in loads),
                *(f"{_at(results, policy, load).p99_ms:.1f}" for load in loads),
                *(f"{_at(results, policy, load).cpu_ms_per_list:.2f}" for load in loads),
            ]
            for policy in POLICIES
        ],
    )
    report.write(
        json_path,
        "batching",
        {
            "log": name,
            "seed": seed,
            "capacity_lists_per_s": round(most, 1),
            "arms": [asdict(result) for result in results],
        },
    )


def _at(results: Sequence[Result], policy: str, load: float) -> Result:
    return next(result for result in results if (result.policy, result.load) == (policy, load))
