"""The whole comparison: which number of workers suits each arm, then rounds over all arms in turn."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
import numpy.typing as npt

from infra.bench import report
from infra.bench.serve.arms import ARMS, CACHE_MB, Arm, Rival
from infra.bench.serve.running import ArmFailed, Running, running
from infra.bench.serve.search import GOAL_MS, Step, highest, place_of, rate
from infra.bench.serve.sessions import ACTIVE, CLICKS, Sessions
from infra.bench.serve.shape import HISTORY
from infra.bench.serve.venvs import CannotInstall
from infra.local.triton import PACKAGES as TRITON_PACKAGES

LISTS: Final = (1, 16)
WORKERS: Final = (2, 1)
_START: Final = place_of(2_000)
# The first number of workers is looked for in strides of this, the next near what the first came to; as near
# as rounds, which begin there, make up for in two steps.
_STRIDE: Final = 8
_NEXT_STRIDE: Final = 3
_NEAR: Final = 2
_WARM_UP: Final = (100.0, 1.0)  # lists per second, seconds
# Of a step while workers are chosen; what is reported comes from whole ones.
_TUNING: Final = 0.5

_SLOWER: Final = ("triton", "litserve", "bentoml", "ray-serve")
_RIVALS: Final = (*_SLOWER, "mosec")
# Name → which arm of ours, lists per request, over the best of which, and what the ratio should be.
GOALS: Final = {
    "gRPC, 1 list, over Triton, LitServe, BentoML, Ray Serve": ("tailrace", 1, _SLOWER, 1.0),
    "gRPC, 1 list, over mosec": ("tailrace", 1, ("mosec",), 0.8),
    "gRPC, 16 lists, over all": ("tailrace", 16, _RIVALS, 1.5),
    "in process, 1 list, over all": ("in-process", 1, _RIVALS, 2.0),
    "in process, 16 lists, over all": ("in-process", 16, _RIVALS, 2.0),
    "in process without a cache, 1 list, over all": ("in-process-uncached", 1, _RIVALS, 2.0),
    "in process without a cache, 16 lists, over all": ("in-process-uncached", 16, _RIVALS, 2.0),
}

# What each may use, beside one model, one number of processors, batches of 32 lists and the wait for them.
MAY_USE: Final = (
    "The others compute the whole `rank` graph for each list, as servers of any model do, in ONNX Runtime, "
    "their histories padded by the client as suits each best. `tailrace` gets the same tensors and is not "
    "told whose they are; it may sort lists of a batch by the lengths of their histories and, where the user "
    "vector alone scores candidates, append to histories that begin alike. `in-process` is asked as the "
    f"stream asks, with who asks. Both may keep {CACHE_MB} MiB of encoded histories a process, so that a "
    "click costs one appended event. `in-process-uncached` keeps nothing."
)

Say = Callable[[str], None]


@dataclass(slots=True)
class Outcome:
    """One arm at one number of lists per request: its best step of each round, None where none kept up."""

    arm: Arm
    lists: int
    workers: int = 0
    place: int = _START
    difference: float = 0.0
    steps: list[Step | None] = field(default_factory=list)
    failure: str = ""

    @property
    def name(self) -> str:
        return f"{self.arm.name}, {self.lists} per request"

    @property
    def goodput(self) -> float:
        """Median over rounds."""
        return median(step.goodput if step else 0.0 for step in self.steps) if self.steps else 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How everything is measured, with the lists of these sessions. A quick one tries one number of workers
    only."""

    registry: Path
    sessions: Sessions
    log: str
    rounds: int
    seconds: float
    seed: int
    quick: bool = False


def run(plan: Plan, arms: Sequence[Arm], say: Say) -> list[Outcome]:
    """Measure; an arm that cannot be had or fails is reported and left out of what follows."""
    outcomes = [Outcome(arm, lists) for lists in LISTS for arm in arms]
    for arm in arms:
        say(f"{arm.name}: what it needs")
        try:
            arm.install()
        except CannotInstall as error:
            for outcome in outcomes:
                outcome.failure = str(error) if outcome.arm is arm else outcome.failure
    with tempfile.TemporaryDirectory(prefix="tailrace-serve-") as folder:
        sessions = Path(folder) / "sessions.npz"
        plan.sessions.save(sessions)
        for number in range(-1, plan.rounds):
            for outcome in outcomes:
                if outcome.failure:
                    continue
                try:
                    if number < 0:
                        _tune(outcome, plan, sessions, say)
                    else:
                        _round(outcome, plan, sessions, number, say)
                except ArmFailed as error:
                    outcome.failure = str(error)
                    say(f"{outcome.name}: {error}")
    return outcomes


def _tune(outcome: Outcome, plan: Plan, sessions: Path, say: Say) -> None:
    """Keep the number of workers with the higher goodput, and where it was found."""
    best, stride = -1.0, _STRIDE
    for workers in WORKERS[:1] if plan.quick else WORKERS:
        with running(outcome.arm, plan.registry, sessions, lists=outcome.lists, workers=workers) as up:
            found = _highest(
                up, plan.seconds * _TUNING, plan.seed, start=outcome.place, stride=stride, within=_NEAR
            )
        stride = _NEXT_STRIDE if found else _STRIDE
        step = found[1] if found else None
        say(f"{outcome.name}, {workers} workers: {_told(step)}")
        goodput = step.goodput if step else 0.0
        if goodput > best:
            best, outcome.workers = goodput, workers
            outcome.place = found[0] if found else 0


def _round(outcome: Outcome, plan: Plan, sessions: Path, number: int, say: Say) -> None:
    arm, lists, workers = outcome.arm, outcome.lists, outcome.workers
    with running(arm, plan.registry, sessions, lists=lists, workers=workers) as up:
        found = _highest(up, plan.seconds, plan.seed + number, start=outcome.place, stride=1)
        outcome.difference = max(outcome.difference, up.difference)
    step = found[1] if found else None
    outcome.steps.append(step)
    outcome.place = found[0] if found else outcome.place
    say(f"round {number + 1}: {outcome.name}: {_told(step)}")


def _highest(
    up: Running, seconds: float, seed: int, *, start: int, stride: int, within: int = 1
) -> tuple[int, Step] | None:
    lists_per_s, warm_up_s = _WARM_UP
    up.step(lists_per_s, seconds=warm_up_s, seed=seed)
    return highest(
        lambda place: up.step(rate(place), seconds=seconds, seed=seed),
        start=start,
        stride=stride,
        within=within,
    )


def _told(step: Step | None) -> str:
    if step is None:
        return f"no rate with p99 within {GOAL_MS:.0f} ms"
    return f"{step.goodput:,.0f} lists/s, p50 {step.p50_ms:.1f}, p99 {step.p99_ms:.1f} ms"


def show(outcomes: Sequence[Outcome], plan: Plan, *, model: str, json_path: Path | None) -> None:
    """A table per number of lists, what the goals say, and the JSON where a path is given."""
    for lists in LISTS:
        chosen = sorted(
            (one for one in outcomes if one.lists == lists and one.steps), key=lambda one: -one.goodput
        )
        report.table(
            f"serve: lists per request {lists}, model {model}, p99 within {GOAL_MS:.0f} ms",
            [
                "arm",
                "lists/s",
                "lowest",
                "highest",
                "p50 ms",
                "p99 ms",
                "workers",
                "computes in",
                "apart",
                "server µs",
                "load µs",
            ],
            [_row(one) for one in chosen],
        )
    for one in outcomes:
        if one.failure:
            report.note(f"{one.name}: not measured: {one.failure}")
    ratios = _ratios(outcomes)
    if ratios:
        report.table(
            "ours over theirs",
            ["", "ratio", "goal"],
            [[name, f"{ratio:.2f}", f"{goal:g}"] for name, (ratio, goal) in ratios.items()],
        )
    lengths, kept = plan.sessions.shown, plan.sessions.lengths
    report.note(
        f"Lists within {GOAL_MS:.0f} ms per second: median, lowest, highest of {plan.rounds} rounds. µs are "
        "of CPU per list, of the server and of the load; in process the load's hold both. Arms share the "
        "machine with their load. bf16 is OpenVINO's, f32 ONNX Runtime's. Apart is how far the scores of the "
        "first requests lie from ONNX Runtime's."
    )
    report.note(
        f"{len(lengths):,} lists of {plan.log}: {ACTIVE:,} users active together, {CLICKS} clicks each, as "
        f"many leaving as coming; histories of {kept.mean():.0f} events on average, {_full(kept):.0%} of "
        f"{HISTORY}, of which {lengths.mean():.0f} are shown. {MAY_USE}"
    )
    report.write(
        json_path,
        "serve",
        {
            "model": model,
            "goal_ms": GOAL_MS,
            "rounds": plan.rounds,
            "seconds_per_step": plan.seconds,
            "seed": plan.seed,
            "log": plan.log,
            "lists": len(lengths),
            "users_active": ACTIVE,
            "clicks_of_a_session": CLICKS,
            "history_mean": round(float(kept.mean()), 1),
            "history_full_share": round(_full(kept), 3),
            "shown_mean": round(float(lengths.mean()), 1),
            "may_use": MAY_USE,
            "rivals": {
                "triton": list(TRITON_PACKAGES),
                **{arm.name: list(arm.requirements) for arm in ARMS if isinstance(arm, Rival)},
            },
            "ratios": {name: {"ratio": ratio, "goal": goal} for name, (ratio, goal) in ratios.items()},
            "arms": [
                {
                    "arm": one.arm.name,
                    "lists_per_request": one.lists,
                    "workers": one.workers,
                    "precision": one.arm.precision,
                    "score_difference": one.difference,
                    "padding": one.arm.padding,
                    "cache_mb": one.arm.cache_mb,
                    "goodput": one.goodput,
                    "failure": one.failure,
                    "rounds": [asdict(step) if step else None for step in one.steps],
                }
                for one in outcomes
            ],
        },
    )


def _full(lengths: npt.NDArray[np.int64]) -> float:
    """The share of histories of which no more can be shown."""
    return float((lengths == HISTORY).mean())


def _row(one: Outcome) -> list[str]:
    kept = [step for step in one.steps if step]
    if not kept:
        return [one.arm.name, "0", *["-"] * 9]
    goodputs = [step.goodput if step else 0.0 for step in one.steps]
    return [
        one.arm.name,
        *(f"{value:,.0f}" for value in (one.goodput, min(goodputs), max(goodputs))),
        f"{median(step.p50_ms for step in kept):.1f}",
        f"{median(step.p99_ms for step in kept):.1f}",
        str(one.workers),
        one.arm.precision,
        f"{one.difference:.1g}",
        f"{median(step.server_cpu_us for step in kept):,.0f}",
        f"{median(step.client_cpu_us for step in kept):,.0f}",
    ]


def _ratios(outcomes: Sequence[Outcome]) -> dict[str, tuple[float, float]]:
    """Ours over the best of theirs, and the goal for it, wherever both were measured."""
    found = {(one.arm.name, one.lists): one.goodput for one in outcomes if one.steps}
    ratios = {}
    for name, (ours, lists, others, goal) in GOALS.items():
        best = max((found.get((other, lists), 0.0) for other in others), default=0.0)
        if best and (ours, lists) in found:
            ratios[name] = (round(found[ours, lists] / best, 3), goal)
    return ratios
