"""`tailrace bench engine-faults`: an engine that hangs, crashes, answers NaN and slows down, under load.

On a machine with neighbours p99 changes from second to second by more than a fault changes it. So there are
many short rounds, each of which compares with what came just before; one of the faults is none, which says
what ratios this machine gives to nothing; and each ratio has an interval over rounds.

Below capacity one lane may do all the work for seconds, as the other is predicted to take longer. So the
engine at fault is the one that does most of it just then, and the fault begins with the first batch or probe
that meets it, and lasts as long from there.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import numpy as np

from features.settings import FeatureSettings
from inference.engines.base import Engine
from inference.errors import EngineFailed
from inference.plane import Plane, Version
from inference.ranker import Warmed
from inference.settings import InferenceSettings
from inference.types import Graph, RankRequest, Tensors
from infra.bench import options as bench_options
from infra.bench import report
from infra.bench.in_process import Outcomes, Seconds, capacity, drive, prepare, run_on_uvloop, tune
from infra.bench.load import poisson
from infra.bench.ratio import Ratio
from topics.messages import BehaviorEvent

NONE: Final = "none"
SLOW: Final = "slow x10"
FAULTS: Final = (NONE, "hang", "crash", "NaN", SLOW)
GOAL_RATIO: Final = 1.5
RECOVERED_AFTER_S: Final = 2.0
LEAD_S: Final = 0.05  # between the drive's first due time and its call
FILLS_S: Final = 1.0  # the load has just begun: not steady
TAIL_S: Final = 0.5  # the fault has ended, and requests still come
SETTLE_S: Final = 3.0  # longer than a lane's pauses by then
_SLOWER: Final = 10.0
_HANG_S: Final = 60.0
_BATCHES: Final = 100  # by which the busier engine is known: some tenths of a second of them


class FaultyEngine:
    """An engine that misbehaves while it is told to. Otherwise it is the one that it stands for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.fault = ""
        self.met = threading.Event()
        self.met_s = math.nan
        self._released = threading.Event()
        self._asked_s: deque[float] = deque([-math.inf] * _BATCHES, _BATCHES)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def since_s(self) -> float:
        """When the last so many batches began: the later, the more it does."""
        return self._asked_s[0]

    def tell(self, fault: str) -> None:
        """Misbehave like this from now on; "" behaves again and lets go of what hangs."""
        if fault:
            self._released.clear()
        else:
            self._released.set()
        self.fault = fault

    def run(self, graph: Graph, inputs: Tensors) -> Tensors:
        fault, began_s = self.fault, time.perf_counter()
        self._asked_s.append(began_s)
        if fault and not self.met.is_set():
            self.met_s = began_s
            self.met.set()
        if fault == "hang":
            self._released.wait(_HANG_S)
        elif fault == "crash":
            raise EngineFailed("told to crash")
        outputs = self._engine.run(graph, inputs)
        if fault == "NaN":
            outputs = {name: np.full_like(output, np.nan) for name, output in outputs.items()}
        elif fault == SLOW:
            self._released.wait((_SLOWER - 1) * (time.perf_counter() - began_s))
        return outputs


@dataclass(frozen=True, slots=True)
class Round:
    """What became of the requests, and when, in their time, the fault began: where an engine met it, or else
    where it was told."""

    outcomes: Outcomes
    began_s: float
    is_met: bool


@dataclass(frozen=True, slots=True)
class Result:
    """One fault, all rounds: p99 of before it, of its first two seconds, and of the rest of it; the ratio of
    the last to the first."""

    fault: str
    rounds_met: int
    requests: int
    unanswered: int
    failed: int
    steady_p99_ms: float
    first_p99_ms: float
    after_p99_ms: float
    ratio: Ratio

    @property
    def back_after(self) -> bool:
        """Of all rounds together. Shown beyond doubt where the whole interval is below the goal."""
        return self.ratio.value <= GOAL_RATIO


async def measure(
    events: Sequence[BehaviorEvent],
    *,
    registry: Path,
    share: float,
    fault_s: float,
    rounds: int,
    spares: int,
    seed: int,
    say: Callable[[str], None],
) -> tuple[list[Result], float]:
    """Each fault on the busier of two lanes, so many times, in another order each round; `share` is of what
    both lanes manage together.

    Histories grow along a log, and what a list costs with them: rounds begin at as many places of it, so
    that what comes before a fault and after it is alike.
    """
    settings = InferenceSettings(lanes="onnx*2", spares=spares)
    requests, statistics = await prepare(events)
    plane = Plane(settings, FeatureSettings(), statistics)
    version = await plane.open(registry, "serving")
    tune()

    async def ask(group: Sequence[RankRequest]) -> Any:
        return await plane.rank(group, version)

    most = await capacity(ask, requests, seconds=4.0)
    await plane.settled()
    found: dict[str, list[Round]] = {fault: [] for fault in FAULTS}
    order = np.random.default_rng(seed)
    for turn in range(rounds):
        for number in order.permutation(len(FAULTS)).tolist():
            lasts_s = 3 * fault_s + TAIL_S
            due_s = poisson(int(most * share * lasts_s), most * share, seed + turn * len(FAULTS) + number)
            drive_it = partial(drive, ask, requests, due_s, first=turn * len(requests) // rounds)
            found[FAULTS[number]].append(await _one(plane, version, drive_it, FAULTS[number], fault_s))
        say(f"{turn + 1} of {rounds} rounds")
    results = [_result(fault, outcomes, fault_s) for fault, outcomes in found.items()]
    await plane.close()
    return results, most


async def _one(
    plane: Plane, version: Version, drive_it: Callable[[], Awaitable[Outcomes]], fault: str, fault_s: float
) -> Round:
    lanes = plane.batcher.dispatcher.lanes
    healthy = {lane.name: version.warmed[lane.name] for lane in lanes}
    watched = {name: FaultyEngine(warmed.engine) for name, warmed in healthy.items()}
    for name, warmed in healthy.items():
        version.warmed[name] = Warmed(watched[name], warmed.buckets)  # type: ignore[arg-type]
    due_from_s = time.perf_counter() + LEAD_S
    misbehaving = asyncio.create_task(_misbehave(list(watched.values()), fault, fault_s))
    outcomes = await drive_it()
    faulty = await misbehaving
    await asyncio.sleep(SETTLE_S)
    version.warmed.update(healthy)
    for lane in lanes:
        lane.profile.restart()
    met_s = faulty.met_s - due_from_s
    # Later than this too little of the load is left to say what it did.
    is_met = met_s <= 2 * fault_s
    return Round(outcomes, met_s if is_met else fault_s, is_met)


async def _misbehave(engines: Sequence[FaultyEngine], fault: str, fault_s: float) -> FaultyEngine:
    """The busiest of them does, from `fault_s` of the load on until as long after something has met it, which
    is waited for as long."""
    loop = asyncio.get_running_loop()
    await asyncio.sleep(LEAD_S + fault_s)
    faulty = max(engines, key=lambda engine: engine.since_s)
    faulty.tell(fault)
    try:
        await loop.run_in_executor(None, faulty.met.wait, fault_s)
        await asyncio.sleep(fault_s)
    finally:
        faulty.tell("")
    return faulty


def _result(fault: str, found: Sequence[Round], fault_s: float) -> Result:
    steady_s = [_between(one, FILLS_S, fault_s) for one in found]
    first_s = [_between(one, one.began_s, one.began_s + RECOVERED_AFTER_S) for one in found]
    after_s = [_between(one, one.began_s + RECOVERED_AFTER_S, one.began_s + fault_s) for one in found]
    steady_ms, first_ms, after_ms = map(_p99_ms, (steady_s, first_s, after_s))
    return Result(
        fault=fault,
        rounds_met=sum(one.is_met for one in found),
        requests=sum(len(one.outcomes.due_s) for one in found),
        unanswered=sum(one.outcomes.unanswered for one in found),
        failed=sum(one.outcomes.failed() for one in found),
        steady_p99_ms=steady_ms,
        first_p99_ms=first_ms,
        after_p99_ms=after_ms,
        ratio=Ratio.of(after_s, steady_s),
    )


def _between(one: Round, from_s: float, to_s: float) -> Seconds:
    """What the requests took that were due between these times of a round."""
    due_s = one.outcomes.due_s
    return one.outcomes.took_s[(due_s >= from_s) & (due_s < to_s)]


def _p99_ms(took_s: Sequence[Seconds]) -> float:
    return round(float(np.nanpercentile(np.concatenate(took_s), 99) * 1e3), 2)


@click.command(name="engine-faults")
@click.option(
    "--share", type=click.FloatRange(0.05, 0.9), default=0.3, show_default=True, help="Of capacity."
)
@click.option("--fault-s", type=click.FloatRange(3, 120), default=4.0, show_default=True)
@click.option("--rounds", type=click.IntRange(1, 100), default=10, show_default=True)
@click.option("--spares", type=click.IntRange(0, 4), default=1, show_default=True)
@bench_options.ranking(clicks=20_000)
def engine_faults(
    *,
    share: float,
    fault_s: float,
    rounds: int,
    spares: int,
    clicks: int,
    log: Path | None,
    registry: Path,
    seed: int,
    json_path: Path | None,
) -> None:
    """One of two engines hangs, crashes, answers NaN and slows down tenfold, each for --fault-s under load.

    Shown are in how many rounds a batch or probe met the fault, the p99 before it, in the first two seconds
    from there, and in the rest of it, and the ratio of that to the first with its 95 % interval over rounds.
    "none" is no fault at all: what ratio this machine gives to nothing.

    \b
    tailrace bench engine-faults
    tailrace bench engine-faults --spares 0 --share 0.2 --json faults.json
    """
    events, name = bench_options.events(log, clicks, seed)
    results, most = run_on_uvloop(
        measure(
            events,
            registry=registry,
            share=share,
            fault_s=fault_s,
            rounds=rounds,
            spares=spares,
            seed=seed,
            say=partial(click.echo, err=True),
        )
    )
    report.table(
        f"an engine out of two at fault, {share * most:,.0f} of {most:,.0f} lists/s: {name}",
        [
            *("fault", "met", "requests", "unanswered", "failed", "p99 before", "first 2 s", "after 2 s"),
            *("ratio", "95 % of rounds", "median round"),
        ],
        [
            [
                result.fault,
                f"{result.rounds_met} of {rounds}",
                f"{result.requests:,}",
                str(result.unanswered),
                str(result.failed),
                f"{result.steady_p99_ms:.1f} ms",
                f"{result.first_p99_ms:.1f} ms",
                f"{result.after_p99_ms:.1f} ms",
                f"{result.ratio.value:.2f}",
                f"{result.ratio.low:.2f} to {result.ratio.high:.2f}",
                f"{result.ratio.median_round:.2f}",
            ]
            for result in results
        ],
    )
    report.write(
        json_path,
        "engine-faults",
        {
            "log": name,
            "seed": seed,
            "capacity_lists_per_s": round(most, 1),
            "share": share,
            "fault_s": fault_s,
            "rounds": rounds,
            "spares": spares,
            "faults": [{**asdict(result), "back_after": result.back_after} for result in results],
        },
    )
