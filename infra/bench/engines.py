"""`tailrace bench engines`: every engine and precision on one released model and the same histories."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import click
import numpy as np

from compression.releases.registry import Artefact, Registry
from features.encoding import encode_histories
from features.sequence import unpack
from inference.buckets import HISTORIES
from inference.engines import placed, places, usable
from inference.engines.base import TOLERANCE, EngineOptions, Precision
from inference.engines.calibration import draw
from inference.types import Tensors
from infra.bench import options as bench_options
from infra.bench import report
from infra.bench.child import started
from infra.bench.engine_arm import CANDIDATES, Arm, serve, width
from infra.commands import options

SIZES: Final = (1, 8, 32)
REFERENCE: Final = ("torch", "f32")
_DISTINCT: Final = 16  # batches of each size, so that no engine answers from a cache of one
_GPU: Final[tuple[tuple[str, str, tuple[Precision, ...]], ...]] = (
    ("torch", "cuda", ("f32", "bf16", "f16")),
    ("onnx", "cuda", ("f32",)),
    ("onnx", "tensorrt", ("f16",)),
    ("tensorrt", "cuda", ("f16", "int8")),
)


@dataclass(slots=True)
class Row:
    """What one arm showed; empty figures and a reason where it was not measured."""

    engine: str
    place: str
    precision: str
    not_measured: str = ""
    p50_ms: dict[int, float] = field(default_factory=dict)
    p99_ms: dict[int, float] = field(default_factory=dict)
    lists_per_s: dict[int, float] = field(default_factory=dict)
    error: float = float("nan")
    tolerance: float = float("nan")
    kept_of_ten: float = float("nan")
    start_s: float = float("nan")
    memory_mib: float = float("nan")
    peak_mib: float = float("nan")


def arms(threads: int) -> tuple[list[Arm], list[Row]]:
    """What can be measured here, and rows for what cannot."""
    found: list[Arm] = []
    absent: list[Row] = []
    here = {status.name: status for status in usable()}
    for name, status in here.items():
        for place, precisions in (places(name) if status.usable else {}).items():
            found += [
                Arm(name, placed(name, place, EngineOptions(threads=threads, precision=precision)))
                for precision in precisions
            ]
    measured = {(arm.engine, arm.place.partition(":")[0].lower(), arm.options.precision) for arm in found}
    for name, place, kinds in _GPU:
        for kind in kinds:
            if (name, place, kind) not in measured:
                why = here[name].why or f"no {place} here"
                absent.append(Row(name, place, kind, not_measured=why))
    found.sort(key=lambda arm: (arm.engine, arm.options.precision) != REFERENCE)
    return found, absent


def batches(artefact: Artefact, log: Path | None, seed: int) -> tuple[dict[int, list[Tensors]], str]:
    """By batch size, the inputs of both graphs: histories of a log's users at random clicks, or drawn."""
    rng = np.random.default_rng(seed)
    vocabulary = artefact.vocabulary()
    longest = artefact.manifest.model.max_history
    histories = (*(size for size in HISTORIES if size < longest), longest)
    sequences, name = (None, f"drawn from the model, seed {seed}") if log is None else _sequences(log, seed)
    made: dict[int, list[Tensors]] = {size: [] for size in SIZES}
    for size, given in made.items():
        for _ in range(_DISTINCT):
            drawn = draw(vocabulary, users=size, history=longest, candidates=CANDIDATES, rng=rng)
            if sequences is None:
                drawn["lengths"] = rng.integers(1, longest + 1, size).astype(np.int32)
            else:
                chosen = [sequences[place] for place in rng.integers(0, len(sequences), size)]
                unpacked = unpack(chosen, last=longest)
                drawn |= encode_histories(unpacked, vocabulary, longest).tensors()
            slots = width(drawn["lengths"], histories)
            for column in ("items", "categories", "behaviors", "gaps"):
                seen = np.arange(slots) < drawn["lengths"][:, None]
                drawn[column] = np.where(seen, drawn[column][:, :slots], 0).astype(np.int32)
            given.append(drawn)
    return made, name


def _sequences(log: Path, seed: int) -> tuple[list[bytes], str]:
    from infra.bench.in_process import prepare

    events, name = bench_options.events(log, 20_000, seed)
    requests, _ = asyncio.run(prepare(events))
    return [request.sequence for request in requests if request.sequence is not None], name


def run(
    registry: Path,
    given: Mapping[int, list[Tensors]],
    found: Sequence[Arm],
    *,
    rounds: int,
    seconds: float,
) -> list[Row]:
    """Every arm in a process of its own, all loaded, then in turn: one measures while the others wait."""
    rows = [Row(arm.engine, arm.place, arm.options.precision) for arm in found]
    took: dict[tuple[int, int], list[float]] = {}
    expected: dict[int, Tensors] = {}
    with ExitStack() as stack:
        pipes: dict[int, Connection] = {}
        for number, (arm, row) in enumerate(zip(found, rows, strict=True)):
            pipe = stack.enter_context(started(serve, arm, registry, given))
            said = _said(pipe)
            if "refused" in said:
                row.not_measured = said["refused"]
                continue
            pipes[number] = pipe
            row.start_s = round(said["start_s"], 2)
            if (arm.engine, arm.options.precision) == REFERENCE and not expected:
                expected = said["answers"]
            row.tolerance = TOLERANCE[arm.options.precision]
            if expected:
                row.error, row.kept_of_ten = _compared(expected, said["answers"])
        for _ in range(rounds):
            for size in given:
                for number, pipe in pipes.items():
                    pipe.send((size, seconds))
                    took.setdefault((number, size), []).extend(_said(pipe))
        for number, pipe in pipes.items():
            pipe.send(None)
            for name, value in _said(pipe).items():
                setattr(rows[number], name, round(value, 1))
    for (number, size), all_s in took.items():
        row = rows[number]
        row.p50_ms[size], row.p99_ms[size] = (
            round(float(np.percentile(all_s, percentile)) * 1e3, 3) for percentile in (50, 99)
        )
        row.lists_per_s[size] = round(size * len(all_s) / sum(all_s), 1)
    return rows


def _said(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise click.ClickException("an engine's process ended before it answered") from None


def _compared(expected: Mapping[int, Tensors], actual: Mapping[int, Tensors]) -> tuple[float, float]:
    """The largest difference of any output, and how many of the ten best by f32 are among the ten best."""
    worst, kept = 0.0, []
    for size, ours in expected.items():
        theirs = actual[size]
        worst = max(worst, *(float(np.abs(ours[name] - theirs[name]).max()) for name in ours))
        best = [np.argsort(-some["scores"], axis=1, kind="stable")[:, :10] for some in (ours, theirs)]
        kept += [len(np.intersect1d(one, other)) for one, other in zip(*best, strict=True)]
    return worst, round(float(np.mean(kept)), 2)


def show(rows: Sequence[Row], *, title: str) -> None:
    """A line per arm; times are of whole batches of 1, 8 and 32 lists."""
    sizes = "/".join(map(str, SIZES))
    report.table(
        title,
        ["engine", f"p50 ms {sizes}", f"p99 ms {sizes}", f"lists/s {sizes}", "error", "of 10", "peak MiB"],
        [_cells(row) for row in rows],
    )
    for row in rows:
        if row.not_measured:
            report.note(f"{_name(row)}: not measured: {row.not_measured}")
        elif row.error > row.tolerance:
            report.note(f"{_name(row)}: the error is above its tolerance, {row.tolerance}")


def _name(row: Row) -> str:
    return f"{row.engine} {row.place} {row.precision}"


def _cells(row: Row) -> list[str]:
    if row.not_measured:
        return [_name(row), "not measured", *[""] * 5]
    return [
        _name(row),
        " / ".join(f"{value:.2f}" for value in row.p50_ms.values()),
        " / ".join(f"{value:.2f}" for value in row.p99_ms.values()),
        " / ".join(f"{value:,.0f}" for value in row.lists_per_s.values()),
        f"{row.error:.1e}",
        f"{row.kept_of_ten:.2f}",
        f"{row.peak_mib:.0f}",
    ]


@click.command()
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True)
@click.option(
    "--seconds", type=click.FloatRange(0.01, 60), default=0.3, show_default=True, help="Per arm, size, round."
)
@click.option("--threads", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option("--engine", "only", multiple=True, help="Only these, and torch in f32; may be repeated.")
@bench_options.log
@options.registry
@bench_options.seed
@bench_options.json_path
def engines(
    *,
    rounds: int,
    seconds: float,
    threads: int,
    only: tuple[str, ...],
    log: Path | None,
    registry: Path,
    seed: int,
    json_path: Path | None,
) -> None:
    """Every engine and precision on the same model: p50, p99, lists/s, parity error, memory.

    A list is a history encoded and 50 candidates scored, in batches of 1, 8 and 32 padded to the smallest
    history bucket. Each engine has its own process; they take turns. Needs no broker and no Redis.

    \b
    tailrace bench engines
    tailrace bench engines --engine onnx --engine openvino --json figures.json
    """
    artefact = Registry(registry).open()
    given, name = batches(artefact, log, seed)
    found, absent = arms(threads)
    if only:
        asked = (*only, "torch")
        found = [
            arm
            for arm in found
            if arm.engine in asked
            and (arm.engine in only or (arm.engine, arm.options.precision) == REFERENCE)
        ]
        absent = [row for row in absent if row.engine in only]
    rows = [*run(registry, given, found, rounds=rounds, seconds=seconds), *absent]
    slots = {
        size: round(float(np.mean([some["items"].shape[1] for some in given[size]])), 1) for size in SIZES
    }
    threads_said = f"{threads} thread{'s' if threads > 1 else ''}"
    show(rows, title=f"engines: {artefact.version}, histories {name}, {threads_said} each")
    report.write(
        json_path,
        "engines",
        {
            "model": artefact.version,
            "shape": artefact.manifest.model.model_dump(),
            "histories": name,
            "mean_slots": slots,
            "candidates": CANDIDATES,
            "seed": seed,
            "threads": threads,
            "rounds": rounds,
            "seconds": seconds,
            "rows": [asdict(row) for row in rows],
        },
    )
