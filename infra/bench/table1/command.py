"""`tailrace bench table1`."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compression.home import home
from infra.bench import options as bench_options
from infra.bench import report
from infra.console import console

if TYPE_CHECKING:
    from infra.bench.table1.shapes import Shape


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
    help="The shape that is trained on a synthetic log to show accuracy.",
)
@click.option(
    "--accuracy-log",
    "logs",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="Item lists or a Taobao-format log to show accuracy on as well; may be given again.",
)
@click.option(
    "--log-shape",
    "log_shape_name",
    type=click.Choice(["full", "small", "quick"]),
    default="full",
    show_default=True,
    help="Of the networks that are trained on each --accuracy-log.",
)
@click.option(
    "--epochs",
    type=click.FloatRange(0.01),
    default=20.0,
    show_default=True,
    help="Of the Baseline's training; all others together take 1.3 times as many.",
)
@click.option(
    "--log-epochs",
    type=click.FloatRange(0.01),
    default=12.0,
    show_default=True,
    help="The same, for each --accuracy-log; all others together take 3.5 times as many.",
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
    logs: tuple[Path, ...],
    log_shape_name: str,
    epochs: float,
    log_epochs: float,
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
    as there are cores. Accuracy is over the catalogue and within fifty candidates: on the synthetic log that
    of smaller networks with the same proportions, on a given log that of the paper's networks with as many
    items as the log has. Networks are kept in .tailrace/table1: a run after the first only measures, and one
    that was stopped is gone on with.

    \b
    tailrace bench table1
    tailrace bench table1 --accuracy-log ml-1m.txt.gz
    tailrace bench table1 --accuracy none
    tailrace bench table1 --shape quick --accuracy quick --epochs 1 --seconds 0.05
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from inference.admission.load import processors
    from infra.bench.table1 import measure
    from infra.bench.table1 import report as of_table
    from infra.bench.table1.shapes import SHAPES
    from infra.bench.table1.steps import Steps

    shape = SHAPES[shape_name]
    say = console().print
    learned: list[dict[str, Any]] = []
    made = None
    for log in (None, *logs) if learned_name != "none" else ():
        name, passes = (learned_name, epochs) if log is None else (log_shape_name, log_epochs)
        steps = Steps(SHAPES[name], folder_of(name, log, passes, seed), passes, seed, say, log)
        trained = steps.all()
        learned.append(
            {
                "log": "synthetic" if log is None else log.name,
                "items": steps.items,
                "shape": asdict(SHAPES[name]),
                "epochs": passes,
                "accuracy": of_table.accuracy_of(trained, steps.trained_on(trained[0])),
            }
        )
        if log is None and learned_name == shape_name:
            made = trained
    if made is None:
        made = Steps(shape, _folder(shape, "random", None, seed), 0.0, seed, say).all()
    workers = max(1, processors() // threads)
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
    for one in learned:
        of_table.show_accuracy(
            one["accuracy"],
            title=f"accuracy: {one['log']}, {one['items']:,} items, d = {one['shape']['dim']}, "
            f"{one['epochs']:g} epochs; changes in percent of Baseline's, with 95 % intervals",
        )
    if figures is not None:
        for path in of_table.draw(lines, learned, figures):
            say(str(path))
    report.write(
        json_path,
        "table1",
        {
            "shape": shape_name,
            "trained": learned_name,
            "threads": threads,
            "workers": workers,
            "rounds": rounds,
            "seconds": seconds,
            "seed": seed,
            "rows": lines,
            "learned": learned,
        },
    )


def folder_of(shape: str, log: Path | None, epochs: float, seed: int) -> Path:
    """Where what is trained on a log is kept: what was trained otherwise is another folder."""
    from infra.bench.table1.shapes import SHAPES

    name = "synthetic"
    if log is not None:
        from compression.releases.provenance import sha256_of

        name = f"{log.name.split('.')[0]}-{sha256_of(log)[:8]}"
    return _folder(SHAPES[shape], f"{name}-{epochs:g}", log, seed)


def _folder(shape: Shape, name: str, log: Path | None, seed: int) -> Path:
    from infra.bench.table1.steps import recipe_of

    return home() / "table1" / f"{shape.name}-{name}-{recipe_of(shape, log)}-seed{seed}"
