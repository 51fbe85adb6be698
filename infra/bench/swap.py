"""`tailrace bench swap`: versions swapped under load, again and again, on the path that the stream uses."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import psutil

from compression.registry import Registry
from features.settings import FeatureSettings
from inference.plane import Plane
from inference.releases.serving import ServingModel
from inference.settings import InferenceSettings
from infra.bench import options as bench_options
from infra.bench import report
from infra.bench.in_process import Outcomes, capacity, drive, prepare, run_on_uvloop, tune
from infra.bench.load import poisson
from infra.commands import options
from stream.metrics import StreamMetrics
from stream.settings import StreamSettings
from topics.messages import BehaviorEvent

GOAL_RATIO: Final = 1.2
# Between the drive's first due time and its call.
LEAD_S: Final = 0.05
# What a request that was due just before a swap ended may still feel of it.
TAIL_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Swap:
    """One swap: from the command until the version before was freed."""

    seconds: float
    p99_ms: float
    steady_p50_ms: float
    rss_mb: float


@dataclass(frozen=True, slots=True)
class Result:
    """All swaps of a run. `ratio` compares the requests due in swap windows with all others."""

    swaps: int
    lists: int
    failed: int
    unanswered: int
    capacity_lists_per_s: float
    rate: float
    swap_s: float
    steady_ms: dict[str, float]
    window_ms: dict[str, float]
    ratio: float
    rss_first_mb: float
    rss_last_mb: float
    rss_kb_per_swap: float
    p50_us_per_swap: float


def two_versions(registry: Path, folder: Path) -> tuple[Path, tuple[str, str]]:
    """A registry with the serving version and a twin of it, whose files are read, built and warmed anew."""
    root = folder / "models"
    first = Registry(registry).resolve("serving")
    shutil.copytree(registry / "versions" / first, root / "versions" / first)
    staging = folder / "staging"
    shutil.copytree(
        root / "versions" / first, staging, ignore=shutil.ignore_patterns("manifest.json", "manifest.sig")
    )
    ours = Registry(root)
    second = f"{first[:58]}-twin"
    ours.publish(staging, ours.manifest(first).model_copy(update={"version": second}))
    ours.promote(first)
    return root, (first, second)


async def measure(
    events: Sequence[BehaviorEvent], *, registry: Path, swaps: int, load: float, steady_s: float, seed: int
) -> tuple[Result, list[Swap]]:
    """Swap back and forth while requests come at `load` times the capacity. Nothing of the version before
    is kept, so every swap loads, verifies, warms, checks, switches, drains and frees."""
    requests, statistics = await prepare(events)
    loop = asyncio.get_running_loop()
    process = psutil.Process()
    with tempfile.TemporaryDirectory(prefix="tailrace-swap-") as name:
        root, versions = two_versions(registry, Path(name))
        settings = StreamSettings(registry=str(root), keep_previous=0)
        model = ServingModel(
            Plane(InferenceSettings(), FeatureSettings(), statistics),
            settings.releases,
            StreamMetrics().releases,
        )
        await model.load()
        tune()
        most = await capacity(model.rank, requests, seconds=4.0)
        rate = load * most
        found: list[Swap] = []
        parts: list[tuple[Outcomes, np.ndarray]] = []
        window_s = 3.0
        for number in range(swaps):
            due_s = poisson(int(rate * (steady_s + 1.25 * window_s)), rate, seed + number)
            began_s = loop.time() + LEAD_S
            driving = asyncio.create_task(drive(model.rank, requests, due_s))
            await asyncio.sleep(steady_s + LEAD_S)
            from_s = loop.time() - began_s
            await asyncio.to_thread(Registry(root).promote, versions[(number + 1) % 2])
            if not await model.load():
                raise click.ClickException(f"a swap was refused: {model.describe()['refused']}")
            await model.settled()
            to_s = loop.time() - began_s
            outcomes = await driving
            inside = (due_s >= from_s) & (due_s <= to_s + TAIL_S)
            window_s = to_s - from_s
            parts.append((outcomes, inside))
            found.append(
                Swap(
                    seconds=round(window_s, 3),
                    p99_ms=round(outcomes.p_ms(99, inside), 2),
                    steady_p50_ms=round(outcomes.p_ms(50, ~inside), 3),
                    rss_mb=round(process.memory_info().rss / 2**20, 1),
                )
            )
        await model.close()
    return _result(found, parts, most, rate), found


def _result(
    found: Sequence[Swap], parts: Sequence[tuple[Outcomes, np.ndarray]], most: float, rate: float
) -> Result:
    took_s = np.concatenate([outcomes.took_s for outcomes, _ in parts])
    inside = np.concatenate([inside for _, inside in parts])
    steady_ms, window_ms = _percentiles(took_s[~inside]), _percentiles(took_s[inside])
    rss_mb = [swap.rss_mb for swap in found]
    tenth = max(1, len(found) // 10)
    return Result(
        swaps=len(found),
        lists=len(took_s),
        failed=sum(outcomes.failed() for outcomes, _ in parts),
        unanswered=sum(outcomes.unanswered for outcomes, _ in parts),
        capacity_lists_per_s=round(most, 1),
        rate=round(rate, 1),
        swap_s=round(float(np.median([swap.seconds for swap in found])), 3),
        steady_ms=steady_ms,
        window_ms=window_ms,
        ratio=round(window_ms["p99"] / steady_ms["p99"], 3),
        rss_first_mb=round(float(np.median(rss_mb[:tenth])), 1),
        rss_last_mb=round(float(np.median(rss_mb[-tenth:])), 1),
        rss_kb_per_swap=round(1024 * _slope(rss_mb), 2),
        p50_us_per_swap=round(1e3 * _slope([swap.steady_p50_ms for swap in found]), 3),
    )


def _percentiles(took_s: Any) -> dict[str, float]:
    took_ms = took_s[~np.isnan(took_s)] * 1e3
    return {f"p{p:g}": round(float(np.percentile(took_ms, p)), 2) for p in (50, 95, 99, 99.9)}


def _slope(values: Sequence[float]) -> float:
    """Per swap, by the median over all pairs (Theil and Sen): one outlier does not tilt it."""
    heights = np.asarray(values)
    one, other = np.triu_indices(len(heights), k=1)
    return float(np.median((heights[other] - heights[one]) / (other - one))) if len(one) else 0.0


@click.command(name="swap")
@click.option("--swaps", type=click.IntRange(1, 100_000), default=200, show_default=True)
@click.option(
    "--load", type=click.FloatRange(0.01, 0.95), default=0.5, show_default=True, help="Share of capacity."
)
@click.option(
    "--steady-s",
    type=click.FloatRange(0.1),
    default=2.0,
    show_default=True,
    help="Between two swaps, to compare with.",
)
@click.option("--clicks", type=click.IntRange(1_000), default=20_000, show_default=True)
@bench_options.log
@options.registry
@bench_options.seed
@bench_options.json_path
def swap(
    *,
    swaps: int,
    load: float,
    steady_s: float,
    clicks: int,
    log: Path | None,
    registry: Path,
    seed: int,
    json_path: Path | None,
) -> None:
    """Swap versions under load: failed requests, p99 in swap windows against steady p99, memory and
    latency from first to last.

    A swap loads, verifies, warms and checks a version, switches to it, drains the one before and frees
    it. The two versions are the serving one and a twin of it; nothing is shared between them.

    \b
    tailrace bench swap
    tailrace bench swap --swaps 20 --load 0.3 --json swap.json
    """
    events, name = bench_options.events(log, clicks, seed)
    began_s = time.monotonic()
    result, found = run_on_uvloop(
        measure(events, registry=registry, swaps=swaps, load=load, steady_s=steady_s, seed=seed)
    )
    took_s = time.monotonic() - began_s
    report.table(
        f"{result.swaps} swaps at {result.rate:,.0f} of {result.capacity_lists_per_s:,.0f} lists/s: {name}",
        ["requests due", "p50", "p95", "p99", "p99.9 ms"],
        [
            [label, *(f"{value:.2f}" for value in figures.values())]
            for label, figures in (
                ("between swaps", result.steady_ms),
                (f"in swaps ({result.swap_s:.1f} s each)", result.window_ms),
            )
        ],
    )
    report.note(
        f"p99 in swaps {result.ratio:.2f} times that between (goal {GOAL_RATIO}); "
        f"{result.failed} failed, {result.unanswered} unanswered of {result.lists:,}; "
        f"memory {result.rss_first_mb:.0f} MB first, {result.rss_last_mb:.0f} MB last "
        f"({result.rss_kb_per_swap:+.0f} KB a swap); p50 {result.p50_us_per_swap:+.1f} µs a swap"
    )
    report.write(
        json_path,
        "swap",
        {
            "log": name,
            "seed": seed,
            "load": load,
            "seconds": round(took_s, 1),
            "result": asdict(result),
            "each": [asdict(one) for one in found],
        },
    )
    if result.failed or result.unanswered:
        raise click.ClickException("requests failed: see the table")
