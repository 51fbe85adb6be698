"""The whole comparison: which number of workers suits each arm, then rounds. All arms climb side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
import numpy.typing as npt

from infra.bench import report
from infra.bench.serve.arms import ARMS, CACHE_MB, Arm, Rival
from infra.bench.serve.running import ArmFailed, Running, running
from infra.bench.serve.search import GOAL_MS, Search, Step, place_of, rate
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
# Lists per second, seconds: everybody who is active has come once, as in a service that has run for a while.
_WARM_UP: Final = (500.0, ACTIVE / 500.0)
# Of a step's time, and of tries, while workers are chosen; what is reported comes from whole ones.
_TUNING: Final = 0.5
_TUNING_TRIES: Final = 2

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

# What each may use, beside one model, one number of processors, batches of 64 lists and the wait for them.
MAY_USE: Final = (
    "The others compute the whole `rank` graph for each list, as servers of any model do, in ONNX Runtime, "
    "their histories padded by the client as suits each best. `tailrace` gets the same tensors and is not "
    "told whose they are; it may sort lists of a batch by the lengths of their histories and, where the user "
    "vector alone scores candidates, append to histories that begin alike. `in-process` is asked as the "
    f"stream asks, with who asks. Both may keep {CACHE_MB} MiB of encoded histories a process, so that a "
    "click costs one appended event. `in-process-uncached` keeps nothing."
)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of goodputs in the same round: median, lowest and highest over rounds, what it should be, over whom."""

    ratio: float
    lowest: float
    highest: float
    goal: float
    over: str


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
    def goodputs(self) -> list[float]:
        """Of each round."""
        return [step.goodput if step else 0.0 for step in self.steps]

    @property
    def goodput(self) -> float:
        """Median over rounds."""
        return median(self.goodputs) if self.steps else 0.0


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
            for lists in LISTS:
                group = [one for one in outcomes if one.lists == lists and not one.failure]
                if number < 0:
                    _tune(group, plan, sessions, say)
                else:
                    _round(group, plan, sessions, number, say)
    return outcomes


@dataclass(frozen=True, slots=True)
class _Try:
    """An arm with so many workers, and the search for what it keeps up with."""

    outcome: Outcome
    workers: int
    search: Search


def _tune(group: Sequence[Outcome], plan: Plan, sessions: Path, say: Say) -> None:
    """Keep the number of workers with the higher goodput, and where it was found."""
    best: dict[str, float] = {}
    for workers in WORKERS[:1] if plan.quick else WORKERS:
        tries = [
            _Try(
                outcome,
                workers,
                Search(
                    start=outcome.place,
                    stride=_NEXT_STRIDE if best.get(outcome.name) else _STRIDE,
                    within=_NEAR,
                    tries=_TUNING_TRIES,
                ),
            )
            for outcome in group
            if not outcome.failure
        ]
        for one in _climb(tries, plan, sessions, plan.seconds * _TUNING, plan.seed, say):
            outcome, found = one.outcome, one.search.found
            say(f"{outcome.name}, {workers} workers: {_told(found)}")
            goodput = found[1].goodput if found else 0.0
            if goodput > best.get(outcome.name, -1.0):
                best[outcome.name] = goodput
                outcome.workers, outcome.place = workers, found[0] if found else 0


def _round(group: Sequence[Outcome], plan: Plan, sessions: Path, number: int, say: Say) -> None:
    tries = [_Try(outcome, outcome.workers, Search(start=outcome.place, stride=1)) for outcome in group]
    for one in _climb(tries, plan, sessions, plan.seconds, plan.seed + number, say):
        outcome, found = one.outcome, one.search.found
        outcome.steps.append(found[1] if found else None)
        outcome.place = found[0] if found else outcome.place
        say(f"round {number + 1}: {outcome.name}: {_told(found)}")


def _climb(
    tries: Sequence[_Try], plan: Plan, sessions: Path, seconds: float, seed: int, say: Say
) -> list[_Try]:
    """All arms are up, and each takes one step in turn until every search has ended: while a machine is
    slower for some seconds or minutes, as shared ones are, it is so for all of them. Whose turn it is not is
    paused. Those that did not fail."""
    with ExitStack() as stack:
        up: list[tuple[_Try, Running]] = []
        for one in tries:
            with _noted(one.outcome, say):
                arm = stack.enter_context(
                    running(
                        one.outcome.arm,
                        plan.registry,
                        sessions,
                        lists=one.outcome.lists,
                        workers=one.workers,
                    )
                )
                arm.step(_WARM_UP[0], seconds=_WARM_UP[1], seed=seed)
                arm.pause()
                one.outcome.difference = max(one.outcome.difference, arm.difference)
                up.append((one, arm))
        searching = up
        while searching:
            for one, arm in searching:
                with _noted(one.outcome, say):
                    assert one.search.place is not None
                    arm.resume()
                    one.search.take(arm.step(rate(one.search.place), seconds=seconds, seed=seed))
                    arm.pause()
            searching = [
                (one, arm)
                for one, arm in searching
                if one.search.place is not None and not one.outcome.failure
            ]
    return [one for one in tries if not one.outcome.failure]


@contextmanager
def _noted(outcome: Outcome, say: Say) -> Iterator[None]:
    """An arm that fails is said to have, and the others go on."""
    try:
        yield
    except ArmFailed as error:
        outcome.failure = str(error)
        say(f"{outcome.name}: {error}")


def _told(found: tuple[int, Step] | None) -> str:
    if found is None:
        return f"no rate with p99 within {GOAL_MS:.0f} ms"
    step = found[1]
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
    found = ratios(outcomes)
    if found:
        report.table(
            "ours over theirs",
            ["", "ratio", "lowest", "highest", "goal", "best of them"],
            [
                [
                    name,
                    f"{one.ratio:.2f}",
                    f"{one.lowest:.2f}",
                    f"{one.highest:.2f}",
                    f"{one.goal:g}",
                    one.over,
                ]
                for name, one in found.items()
            ],
        )
    lengths, kept = plan.sessions.shown, plan.sessions.lengths
    report.note(
        f"Lists within {GOAL_MS:.0f} ms per second: median, lowest, highest of {plan.rounds} rounds; ratios "
        "are of the same round. µs are of CPU per list, of the server and of the load; in process the load's "
        "hold both. Arms share the machine with their load, and each takes one step in turn. bf16 is "
        "OpenVINO's, f32 ONNX Runtime's. Apart is how far the scores of the first requests lie from ONNX "
        "Runtime's."
    )
    report.note(
        f"{len(lengths):,} lists of {plan.log}: {ACTIVE:,} users active together, {CLICKS} clicks each, as "
        "many leaving as coming, each of whom has come once before arms are measured; histories of "
        f"{kept.mean():.0f} events on average, {_full(kept):.0%} of {HISTORY}, of which "
        f"{lengths.mean():.0f} are shown. {MAY_USE}"
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
            "ratios": {name: asdict(one) for name, one in found.items()},
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
    return [
        one.arm.name,
        *(f"{value:,.0f}" for value in (one.goodput, min(one.goodputs), max(one.goodputs))),
        f"{median(step.p50_ms for step in kept):.1f}",
        f"{median(step.p99_ms for step in kept):.1f}",
        str(one.workers),
        one.arm.precision,
        f"{one.difference:.1g}",
        f"{median(step.server_cpu_us for step in kept):,.0f}",
        f"{median(step.client_cpu_us for step in kept):,.0f}",
    ]


def ratios(outcomes: Sequence[Outcome]) -> dict[str, Ratio]:
    """Ours over the best of theirs, by its median, in the same round; wherever both were measured."""
    measured = {(one.arm.name, one.lists): one for one in outcomes if one.steps and not one.failure}
    ratios = {}
    for name, (ours, lists, others, goal) in GOALS.items():
        own = measured.get((ours, lists))
        theirs = [measured[other, lists] for other in others if (other, lists) in measured]
        if own and theirs:
            best = max(theirs, key=lambda one: one.goodput)
            # Who kept up with no rate is taken for the grid's lowest.
            found = [
                mine / max(rate(0), other) for mine, other in zip(own.goodputs, best.goodputs, strict=True)
            ]
            ratios[name] = Ratio(median(found), min(found), max(found), goal, best.arm.name)
    return ratios
