"""`tailrace bench dispatch`: what batcher and dispatcher cost per request, with engines that do nothing."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import click

from inference.batcher import Batcher, BatcherLimits
from inference.dispatcher import Lane
from inference.types import RankRequest
from infra.bench import options as bench_options
from infra.bench import report
from infra.bench.in_process import run_on_uvloop, tune

GOAL_US: Final = 30.0
MAX_BATCH: Final = 32
LANES: Final = 2
# How many groups wait at once: enough that a batch is full whenever a lane is free.
_IN_FLIGHT: Final = 128
_DEADLINE_S: Final = 60.0
# Name → items a group. The stream submits what one poll brought; a server, one request's lists.
GROUPS: Final = {"groups of 32": 32, "groups of 16": 16, "one by one": 1}


@dataclass(frozen=True, slots=True)
class Result:
    """One way to submit. CPU is of the whole process, threads and the asking tasks included."""

    way: str
    requests: int
    cpu_us: float
    requests_per_s: float
    mean_batch: float


async def measure(group: int, requests: int) -> tuple[float, float, float]:
    """CPU seconds, wall seconds and items per batch of so many requests, in groups of one size."""
    lanes = [Lane(f"nothing-{number}", _nothing) for number in range(LANES)]
    batcher: Batcher[RankRequest, Any] = Batcher(lanes, BatcherLimits(max_batch=MAX_BATCH))
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + _DEADLINE_S
    items = [RankRequest(user, None, deadline_s=deadline_s) for user in range(group)]
    askers = max(1, _IN_FLIGHT // group)

    async def keep_asking() -> None:
        for _ in range(requests // group // askers):
            await batcher.submit(items)

    await asyncio.gather(*(batcher.submit(items) for _ in range(askers)))
    before, batches_before = batcher.counts.answered, batcher.counts.batches
    cpu_s, began_s = _cpu_s(), loop.time()
    await asyncio.gather(*(keep_asking() for _ in range(askers)))
    cpu_s, took_s = _cpu_s() - cpu_s, loop.time() - began_s
    answered = batcher.counts.answered - before
    await batcher.drain()
    return cpu_s / answered, took_s / answered, answered / (batcher.counts.batches - batches_before)


def _nothing(_: object, items: list[RankRequest]) -> Sequence[RankRequest]:
    return items


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def _rounds(requests: int, rounds: int) -> list[Result]:
    tune()
    taken: dict[str, list[tuple[float, float, float]]] = {way: [] for way in GROUPS}
    for _ in range(rounds):
        for way, group in GROUPS.items():
            taken[way].append(await measure(group, requests))
    return [
        Result(
            way=way,
            requests=requests,
            cpu_us=round(1e6 * median(cpu_s for cpu_s, _, _ in found), 2),
            requests_per_s=round(1 / median(took_s for _, took_s, _ in found)),
            mean_batch=round(median(batch for _, _, batch in found), 1),
        )
        for way, found in taken.items()
    ]


@click.command()
@click.option("--requests", type=click.IntRange(1_000), default=102_400, show_default=True)
@click.option("--rounds", type=click.IntRange(1, 20), default=3, show_default=True)
@bench_options.json_path
def dispatch(*, requests: int, rounds: int, json_path: Path | None) -> None:
    """CPU of batcher and dispatcher per request, with engines that do nothing, in batches of 32.

    Every request has a deadline, and two lanes take turns. The goal is 30 µs. Ends 1 where it is missed.

    \b
    tailrace bench dispatch
    """
    results = run_on_uvloop(_rounds(requests, rounds))
    report.table(
        f"dispatch: {requests:,} requests, batches of at most {MAX_BATCH}, {LANES} lanes that do nothing",
        ["submitted", "CPU µs per request", "requests/s", "mean batch"],
        [
            [one.way, f"{one.cpu_us:.1f}", f"{one.requests_per_s:,.0f}", f"{one.mean_batch:.1f}"]
            for one in results
        ],
    )
    report.write(
        json_path,
        "dispatch",
        {"goal_us": GOAL_US, "rounds": rounds, "results": [asdict(one) for one in results]},
    )
    if max(one.cpu_us for one in results) > GOAL_US:
        raise click.ClickException(f"more than {GOAL_US:.0f} µs: see the table")
