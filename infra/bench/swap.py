"""`tailrace bench swap`: versions swapped under load, again and again, on the path that the stream uses."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import psutil

from compression.releases.registry import Registry, read_item_table
from features.settings import FeatureSettings
from inference.plane import Plane
from inference.releases.serving import ServingModel
from inference.settings import InferenceSettings
from infra.bench import options as bench_options
from infra.bench import report
from infra.bench.in_process import Outcomes, capacity, drive, prepare, run_on_uvloop, tune
from infra.bench.load import poisson
from infra.bench.ratio import Ratio
from infra.bench.yardstick import Yardstick
from stream.metrics import StreamMetrics
from stream.settings import StreamSettings
from topics.messages import BehaviorEvent

GOAL_RATIO: Final = 1.2
# Between the drive's first due time and its call.
LEAD_S: Final = 0.05
# A window goes on for so long after its swap: the cache of the new version is still filling.
TAIL_S: Final = 0.2
# The load has just begun, with nothing waiting and nothing running: neither steady nor a window.
SETTLE_S: Final = 0.2
# Memory is flat where all swaps together add no more than this share of it, at 95 % confidence.
FLAT: Final = 0.02
_Z: Final = 1.96
# No swap takes longer than this; the first of a process imports libraries beside all others.
MOST_S: Final = 120.0
# Steady load before the first swap, where it is to last as long as the swap before.
FIRST_STEADY_S: Final = 4.0
CAPACITY_S: Final = 4.0
LOOK_S: Final = 0.002


@dataclass(frozen=True, slots=True)
class Swap:
    """One swap: from the command until the version before was freed and the spares were warm."""

    seconds: float
    seen_before: bool
    p50_ms: float
    p99_ms: float
    steady_s: float
    steady_p50_ms: float
    steady_p99_ms: float
    capacity_lists_per_s: float
    machine_ms: float
    rss_mb: float
    prepared_mb: float


@dataclass(frozen=True, slots=True)
class Slope:
    """What a swap adds, by the median over all pairs of swaps (Theil and Sen): one outlier does not tilt it.
    With the 95 % confidence interval that Kendall's rank statistic gives."""

    per_swap: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], digits: int) -> Slope:
        """Raises `ValueError` for fewer than two swaps."""
        heights = np.asarray(values)
        one, other = np.triu_indices(len(heights), k=1)
        if not len(one):
            raise ValueError("a slope needs two swaps")
        slopes = np.sort((heights[other] - heights[one]) / (other - one))
        count = len(heights)
        half = _Z * math.sqrt(count * (count - 1) * (2 * count + 5) / 18) / 2
        low = max(0, math.floor(len(slopes) / 2 - half))
        high = min(len(slopes) - 1, math.ceil(len(slopes) / 2 + half))
        found = (float(np.median(slopes)), float(slopes[low]), float(slopes[high]))
        return cls(*(round(value, digits) for value in found))


@dataclass(frozen=True, slots=True)
class Ends:
    """The same figure in the first and in the last tenth of all swaps, medians over its swaps."""

    first: float
    last: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Ends:
        tenth = max(1, len(values) // 10)
        return cls(*(round(float(np.median(part)), 2) for part in (values[:tenth], values[-tenth:])))


@dataclass(frozen=True, slots=True)
class Result:
    """All swaps of a run. `ratio` compares p99 of the requests due in swap windows with that of those due
    just before. `capacity_lists_per_s`, `rate`, `swap_s` and `steady_s`: medians over swaps.
    Slopes are those of the second half: by then every version has been served, and caches are full.
    `machine_ms` is what a fixed piece of work took before each swap's load; `p50_by_machine_percent_per_swap`
    what a swap adds to p50 as it would be on a machine that is always as fast."""

    swaps: int
    lists: int
    failed: int
    unanswered: int
    capacity_lists_per_s: float
    rate: float
    swap_s: float
    steady_s: float
    steady_ms: dict[str, float]
    window_ms: dict[str, float]
    window_by_kind_ms: dict[str, dict[str, float]]
    ratio: Ratio
    loop_lag_steady_ms: dict[str, float]
    loop_lag_window_ms: dict[str, float]
    rss_mb: Ends
    rss_kb_per_swap: Slope
    rss_is_flat: bool
    prepared_mb: Ends
    steady_p50_ms: Ends
    steady_p99_ms: Ends
    window_p50_ms: Ends
    window_p99_ms: Ends
    steady_p50_us_per_swap: Slope
    machine_ms: Ends
    p50_by_machine_percent_per_swap: Slope


def versions_of(registry: Path, folder: Path, count: int) -> tuple[Path, list[str]]:
    """A registry of so many versions like the serving one, each with weights of its own: no file of one is a
    file of another."""
    root = folder / "models"
    theirs, ours = Registry(registry), Registry(root)
    first = theirs.open("serving")
    names = []
    for number in range(count):
        staging = folder / "staging"
        shutil.copytree(first.path, staging, ignore=shutil.ignore_patterns("manifest.json", "manifest.sig"))
        perturb(staging, number + 1)
        names.append(f"{first.version[:58]}-{number}")
        ours.publish(staging, first.manifest.model_copy(update={"version": names[-1]}))
        shutil.rmtree(staging)
    ours.promote(names[0])
    return root, names


def perturb(folder: Path, seed: int) -> None:
    """Move every large weight of a version by a thousandth or so, the same weight alike in every file."""
    import onnx
    from onnx import numpy_helper
    from safetensors.numpy import load_file, save_file

    def moved(array: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(seed).standard_normal(array.shape, np.float32)
        return np.asarray(array * (1 + 1e-3 * noise), array.dtype)

    for path in sorted(folder.iterdir()):
        if path.suffix == ".onnx":
            model = onnx.load(path)
            for tensor in model.graph.initializer:
                if tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) >= 1024:
                    array = moved(numpy_helper.to_array(tensor))
                    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            onnx.save(model, path)
        elif path.suffix == ".safetensors":
            save_file({name: moved(array) for name, array in load_file(path).items()}, path)
        elif path.name == "item_table.npy":
            np.save(path, moved(read_item_table(path.read_bytes())))


async def measure(
    events: Sequence[BehaviorEvent],
    *,
    registry: Path,
    swaps: int,
    versions: int,
    load: float,
    steady_s: float | None,
    seed: int,
    say: Callable[[str], None],
) -> tuple[Result, list[Swap]]:
    """Swap from version to version while requests come at `load` times the capacity. Nothing of the version
    before is kept, so every swap verifies, loads, warms, checks, switches, drains and frees. Before every
    other round what was prepared of the versions is deleted: this machine has never seen them. Capacity is
    measured again where such a pair of rounds begins, so that the load follows the machine's speed; without
    `steady_s` what is steady lasts as long as the swap before, so that a hiccup of the machine is as likely
    to be met in the one as in the other."""
    requests, statistics = await prepare(events)
    process = psutil.Process()
    with tempfile.TemporaryDirectory(prefix="tailrace-swap-") as name, _cache(Path(name)) as cache:
        root, names = versions_of(registry, Path(name), versions)
        settings = StreamSettings(registry=str(root), keep_previous=0)
        plane = Plane(InferenceSettings(), FeatureSettings(), statistics)
        model = ServingModel(plane, settings.releases, StreamMetrics().releases)
        await model.load()
        await plane.settled()
        yardstick = Yardstick()
        tune()
        found: list[Swap] = []
        kept: list[Kept] = []
        asked = 0
        for number in range(swaps):
            seen = number // versions % 2 == 1
            if not seen and number % versions == 0:
                await asyncio.to_thread(shutil.rmtree, cache, ignore_errors=True)
            # On from where the last one ended: histories grow along a log, and their cost with them.
            if number % (2 * versions) == 0:
                most = await capacity(model.rank, requests, seconds=CAPACITY_S, first=asked)
                asked += int(most * CAPACITY_S)
            rate = load * most
            machine_ms = await asyncio.to_thread(yardstick.read_ms)
            before_s = steady_s or (found[-1].seconds if found else FIRST_STEADY_S)
            due_s = poisson(int(rate * (SETTLE_S + before_s + MOST_S)), rate, seed + number)
            ask = partial(drive, model.rank, requests, due_s, first=asked)
            part = await _one(model, plane, ask, before_s, root, names[(number + 1) % versions])
            asked += len(part.outcomes.due_s)
            kept.append(Kept.of(part, Path(name) / f"swap-{number}"))
            found.append(
                Swap(
                    seconds=round(part.to_s - part.from_s, 3),
                    seen_before=seen,
                    p50_ms=round(part.outcomes.p_ms(50, part.inside), 3),
                    p99_ms=round(part.outcomes.p_ms(99, part.inside), 2),
                    steady_s=round(before_s, 3),
                    steady_p50_ms=round(part.outcomes.p_ms(50, part.before), 3),
                    steady_p99_ms=round(part.outcomes.p_ms(99, part.before), 2),
                    capacity_lists_per_s=round(most, 1),
                    machine_ms=round(machine_ms, 3),
                    rss_mb=round(process.memory_info().rss / 2**20, 1),
                    prepared_mb=round(_size_mb(cache), 1),
                )
            )
            if (number + 1) % max(1, swaps // 20) == 0:
                last = found[-1]
                say(f"{number + 1} of {swaps} swaps; p99 {last.p99_ms} ms in it, {last.steady_p99_ms} before")
        await model.close()
    return _result(found, kept, load), found


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One swap's requests: those due `before` it [n], once the load had settled, and from its beginning to
    its end `inside` [n]. And how late the event loop was, sample by sample: when, and seconds."""

    outcomes: Outcomes
    from_s: float
    to_s: float
    lag_at_s: np.ndarray
    lag_s: np.ndarray

    @property
    def before(self) -> np.ndarray:
        return np.asarray((self.outcomes.due_s >= SETTLE_S) & (self.outcomes.due_s < self.from_s))

    @property
    def inside(self) -> np.ndarray:
        return np.asarray(self.outcomes.due_s >= self.from_s)

    def lags_s(self, *, inside: bool) -> np.ndarray:
        since_s = self.from_s if inside else SETTLE_S
        until_s = math.inf if inside else self.from_s
        return np.asarray(self.lag_s[(self.lag_at_s >= since_s) & (self.lag_at_s < until_s)])


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What is kept of one swap, in files: the memory of this process is what is measured. Seconds."""

    lists: int
    failed: int
    unanswered: int
    before_s: np.ndarray
    inside_s: np.ndarray
    lag_before_s: np.ndarray
    lag_inside_s: np.ndarray

    @classmethod
    def of(cls, part: Part, file: Path) -> Kept:
        """With its arrays in files that are named after this one. They stay readable when it is deleted."""
        took_s = part.outcomes.took_s
        arrays = (
            took_s[part.before],
            took_s[part.inside],
            part.lags_s(inside=False),
            part.lags_s(inside=True),
        )
        written = [
            _written(file.with_name(f"{file.name}-{number}.npy"), array)
            for number, array in enumerate(arrays)
        ]
        return cls(len(took_s), part.outcomes.failed(), part.outcomes.unanswered, *written)


def _written(file: Path, array: np.ndarray) -> np.ndarray:
    """The same numbers, in a file instead of in memory."""
    if not array.size:
        return array
    np.save(file, array.astype(np.float32))
    mapped: np.ndarray = np.load(file, mmap_mode="r")
    return mapped


async def _one(
    model: ServingModel,
    plane: Plane,
    ask: Callable[..., Awaitable[Outcomes]],
    steady_s: float,
    root: Path,
    version: str,
) -> Part:
    """Load, and in the midst of it a swap; it ends when the version before has been freed, the spares of
    the new one are warm and what its empty cache costs has been felt."""
    loop = asyncio.get_running_loop()
    began_s = loop.time() + LEAD_S
    enough = asyncio.Event()
    lags: list[tuple[float, float]] = []
    watching = asyncio.create_task(_watch_loop(began_s, lags))
    driving = asyncio.ensure_future(ask(enough=enough))
    await asyncio.sleep(LEAD_S + SETTLE_S + steady_s)
    from_s = loop.time() - began_s
    await asyncio.to_thread(Registry(root).promote, version)
    if not await model.load():
        raise click.ClickException(f"a swap was refused: {model.describe()['refused']}")
    await model.settled()
    await plane.settled()
    to_s = loop.time() - began_s
    await asyncio.sleep(TAIL_S)
    enough.set()
    outcomes = await driving
    watching.cancel()
    at_s, late_s = np.array(lags).T
    return Part(outcomes, from_s, to_s, at_s, late_s)


async def _watch_loop(began_s: float, lags: list[tuple[float, float]]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + LOOK_S
        await asyncio.sleep(LOOK_S)
        now_s = loop.time()
        lags.append((now_s - began_s, now_s - due_s))


@contextlib.contextmanager
def _cache(folder: Path) -> Iterator[Path]:
    """A cache folder of the bench's own, for this process and its children."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        yield folder / "cache" / "tailrace" / "prepared"
    finally:
        del os.environ["XDG_CACHE_HOME"]
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


def _result(found: Sequence[Swap], kept: Sequence[Kept], load: float) -> Result:
    before_s, inside_s = [one.before_s for one in kept], [one.inside_s for one in kept]
    steady_ms = _percentiles(before_s)
    window_ms = _percentiles(inside_s)
    kinds = {"never seen": False, "seen before": True}
    by_kind = {
        name: _percentiles(
            [took for took, swap in zip(inside_s, found, strict=True) if swap.seen_before == seen]
        )
        for name, seen in kinds.items()
        if any(swap.seen_before == seen for swap in found)
    }
    later = found[len(found) // 2 :]
    rss_kb = Slope.of([1024 * swap.rss_mb for swap in later], 2)
    rss_mb = Ends.of([swap.rss_mb for swap in found])
    machine_ms = float(np.median([swap.machine_ms for swap in later]))
    p50_ms = float(np.median([swap.steady_p50_ms for swap in later]))
    alike = [swap.steady_p50_ms / swap.machine_ms * machine_ms / p50_ms for swap in later]
    most = float(np.median([swap.capacity_lists_per_s for swap in found]))
    return Result(
        swaps=len(found),
        lists=sum(one.lists for one in kept),
        failed=sum(one.failed for one in kept),
        unanswered=sum(one.unanswered for one in kept),
        capacity_lists_per_s=round(most, 1),
        rate=round(load * most, 1),
        swap_s=round(float(np.median([swap.seconds for swap in found])), 3),
        steady_s=round(float(np.median([swap.steady_s for swap in found])), 3),
        steady_ms=steady_ms,
        window_ms=window_ms,
        window_by_kind_ms=by_kind,
        ratio=Ratio.of(inside_s, before_s),
        loop_lag_steady_ms=_percentiles([one.lag_before_s for one in kept]),
        loop_lag_window_ms=_percentiles([one.lag_inside_s for one in kept]),
        rss_mb=rss_mb,
        rss_kb_per_swap=rss_kb,
        rss_is_flat=rss_kb.high * len(found) <= FLAT * 1024 * rss_mb.first,
        prepared_mb=Ends.of([swap.prepared_mb for swap in found]),
        steady_p50_ms=Ends.of([swap.steady_p50_ms for swap in found]),
        steady_p99_ms=Ends.of([swap.steady_p99_ms for swap in found]),
        window_p50_ms=Ends.of([swap.p50_ms for swap in found]),
        window_p99_ms=Ends.of([swap.p99_ms for swap in found]),
        steady_p50_us_per_swap=Slope.of([1e3 * swap.steady_p50_ms for swap in later], 1),
        machine_ms=Ends.of([swap.machine_ms for swap in found]),
        p50_by_machine_percent_per_swap=Slope.of([100 * one for one in alike], 3),
    )


def _percentiles(parts_s: Sequence[Any]) -> dict[str, float]:
    took_s = np.concatenate(parts_s)
    took_ms = took_s[~np.isnan(took_s)] * 1e3
    return {f"p{p:g}": round(float(np.percentile(took_ms, p)), 2) for p in (50, 95, 99, 99.9)}


def _size_mb(folder: Path) -> float:
    """Of all files below; what is being replaced meanwhile does not count."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total / 2**20


@click.command(name="swap")
@click.option("--swaps", type=click.IntRange(4, 100_000), default=200, show_default=True)
@click.option(
    "--load",
    type=click.FloatRange(0.01, 0.95),
    default=0.35,
    show_default=True,
    help="Share of the lists per second that are ranked when requests always wait; measured now and then.",
)
@click.option(
    "--steady-s",
    type=click.FloatRange(0.1),
    show_default="as long as the swap before took",
    help="Under load before each swap, to compare with, once the load has settled.",
)
@click.option("--versions", type=click.IntRange(2, 8), default=4, show_default=True, help="To swap among.")
@bench_options.ranking(clicks=20_000)
def swap(
    *,
    swaps: int,
    load: float,
    steady_s: float | None,
    versions: int,
    clicks: int,
    log: Path | None,
    registry: Path,
    seed: int,
    json_path: Path | None,
) -> None:
    """Swap versions under load: failed requests, p99 in swap windows against steady p99, memory and
    latency from first to last.

    A swap verifies, loads, warms and checks a version, switches to it, drains the one before and frees
    it. The versions are like the serving one, with weights of their own: no file of one is another's. Half
    of the swaps are to a version that this machine has never seen, half to one that it has opened before.

    \b
    tailrace bench swap
    tailrace bench swap --swaps 20 --load 0.5 --json swap.json
    """
    events, name = bench_options.events(log, clicks, seed)
    began_s = time.monotonic()
    result, found = run_on_uvloop(
        measure(
            events,
            registry=registry,
            swaps=swaps,
            versions=versions,
            load=load,
            steady_s=steady_s,
            seed=seed,
            say=partial(click.echo, err=True),
        )
    )
    took_s = time.monotonic() - began_s
    report.table(
        f"{result.swaps} swaps at {result.rate:,.0f} of {result.capacity_lists_per_s:,.0f} lists/s: {name}",
        ["requests due", "p50", "p95", "p99", "p99.9 ms"],
        [
            [label, *(f"{value:.2f}" for value in figures.values())]
            for label, figures in (
                (f"before swaps ({result.steady_s:.1f} s each)", result.steady_ms),
                (f"in swaps ({result.swap_s:.1f} s each)", result.window_ms),
                *((f"  to a version {kind}", ms) for kind, ms in result.window_by_kind_ms.items()),
                ("event loop late, before", result.loop_lag_steady_ms),
                ("event loop late, in swaps", result.loop_lag_window_ms),
            )
        ],
    )
    report.table(
        "first against last tenth of the swaps",
        ["", "first", "last"],
        [
            [label, f"{ends.first:,.2f}", f"{ends.last:,.2f}"]
            for label, ends in (
                ("p50 before, ms", result.steady_p50_ms),
                ("p99 before, ms", result.steady_p99_ms),
                ("p50 in swaps, ms", result.window_p50_ms),
                ("p99 in swaps, ms", result.window_p99_ms),
                ("a fixed piece of work before, ms", result.machine_ms),
                ("memory, MB", result.rss_mb),
                ("prepared on disk, MB", result.prepared_mb),
            )
        ],
    )
    ratio, grows, slower = result.ratio, result.rss_kb_per_swap, result.steady_p50_us_per_swap
    alike = result.p50_by_machine_percent_per_swap
    report.note(
        f"p99 in swaps {ratio.value:.2f} times that before ({ratio.low:.2f} to {ratio.high:.2f} by swaps, "
        f"median swap {ratio.median_round:.2f}, goal {GOAL_RATIO}); "
        f"{result.failed} failed, {result.unanswered} unanswered of {result.lists:,}; in the second half a "
        f"swap adds {grows.per_swap:+.1f} KB of memory ({grows.low:+.1f} to {grows.high:+.1f}), which is "
        f"{'flat' if result.rss_is_flat else 'not shown to be flat'}, and {slower.per_swap:+.1f} µs to p50 "
        f"({slower.low:+.1f} to {slower.high:+.1f}); by the speed of the machine, {alike.per_swap:+.3f} % "
        f"({alike.low:+.3f} to {alike.high:+.3f})"
    )
    report.write(
        json_path,
        "swap",
        {
            "log": name,
            "seed": seed,
            "load": load,
            "versions": versions,
            "steady_s": steady_s,
            "seconds": round(took_s, 1),
            "result": asdict(result),
            "each": [asdict(one) for one in found],
        },
    )
    if result.failed or result.unanswered:
        raise click.ClickException("requests failed: see the table")
