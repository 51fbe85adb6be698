"""`tailrace bench table1`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click

from compression.home import home
from infra.bench import options as bench_options
from infra.bench import report
from infra.console import console


@click.command()
@click.option(
    "--shape", "shape_name", type=click.Choice(["full", "small", "quick"]), default="full", show_default=True
)
@click.option(
    "--accuracy",
    "learned_name",
    type=click.Choice(["full", "small", "quick", "none"]),
    default="small",
    show_default=True,
    help="The shape that is trained to show accuracy.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(0.01),
    default=4.0,
    show_default=True,
    help="Processor time of the Baseline's training; the rest takes 3.7 times as long.",
)
@click.option("--rounds", type=click.IntRange(1, 100), default=4, show_default=True)
@click.option(
    "--seconds", type=click.FloatRange(0.01, 60), default=0.5, show_default=True, help="Per arm and round."
)
@click.option("--threads", type=click.IntRange(1, 64), default=1, show_default=True, help="Of one request.")
@click.option("--figures", type=click.Path(file_okay=False, path_type=Path), help="Draw figures 5 to 7 here.")
@bench_options.seed
@bench_options.json_path
def table1(
    *,
    shape_name: str,
    learned_name: str,
    minutes: float,
    rounds: int,
    seconds: float,
    threads: int,
    figures: Path | None,
    seed: int,
    json_path: Path | None,
) -> None:
    """The paper's Table I: five methods, per-candidate scoring and shared history, interleaved.

    Latency and throughput do not depend on what was learned, so they are taken at the paper's shape with
    random weights, unless that is the shape that is trained. Throughput is of as many requests at a time
    as there are cores. Networks are kept in .tailrace/table1: a run after the first only measures.

    \b
    tailrace bench table1
    tailrace bench table1 --accuracy none
    tailrace bench table1 --shape quick --accuracy quick --minutes 0.05 --seconds 0.05
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from infra.bench.table1 import measure
    from infra.bench.table1 import report as of_table
    from infra.bench.table1.shapes import SHAPES
    from infra.bench.table1.steps import Steps

    shape = SHAPES[shape_name]
    say = console().print
    learned = None
    if learned_name != "none":
        folder = home() / "table1" / f"{learned_name}-{minutes:g}min-seed{seed}"
        learned = Steps(SHAPES[learned_name], folder, minutes, seed, say).all()
    if learned is not None and learned_name == shape_name:
        made = learned
    else:
        made = Steps(shape, home() / "table1" / f"{shape_name}-random-seed{seed}", 0.0, seed, say).all()
    workers = max(1, (os.cpu_count() or 1) // threads)
    with tempfile.TemporaryDirectory(prefix="tailrace-table1-") as work:
        found = measure.arms(made, shape, Path(work), threads=threads, workers=workers, seed=seed)
        rows, scores = measure.run(found, rounds=rounds, seconds=seconds)
        measure.compare(rows, made, scores, found)
    lines = of_table.rows_of(rows, made)
    of_table.show(
        lines,
        title=f"table1: {shape.items:,} items, {shape.history} events, {shape.candidates} candidates, "
        f"{threads} thread{'s' * (threads > 1)}, {workers} at a time; shares are of Baseline, per candidate",
    )
    accuracy = of_table.losses(learned or [])
    if accuracy and learned is not None:
        trained = SHAPES[learned_name]
        of_table.show_losses(
            accuracy,
            title=f"accuracy: {trained.items:,} items, {trained.log_events:,} synthetic events, "
            f"d = {trained.dim}, {minutes:g} minutes; change against Baseline, trained on",
        )
    if figures is not None:
        for path in of_table.draw(lines, accuracy, figures):
            say(str(path))
    report.write(
        json_path,
        "table1",
        {
            "shape": shape_name,
            "trained": learned_name,
            "minutes": minutes,
            "threads": threads,
            "workers": workers,
            "rounds": rounds,
            "seconds": seconds,
            "seed": seed,
            "rows": lines,
            "accuracy": accuracy,
        },
    )
