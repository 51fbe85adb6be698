"""`tailrace tune`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from compression.home import home
from infra.bench import options as bench_options
from infra.console import console


@click.command()
@click.option(
    "--log",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Item lists or a Taobao-format log; a synthetic one otherwise.",
)
@click.option(
    "--shape", "shape_name", type=click.Choice(["small", "quick"]), default="small", show_default=True
)
@click.option(
    "--epochs",
    type=click.FloatRange(0.01),
    default=20.0,
    show_default=True,
    help="Of the whole network's training, which `bench table1` shares.",
)
@click.option(
    "--trial-epochs",
    type=click.FloatRange(0.01),
    default=2.0,
    show_default=True,
    help="To teach each network.",
)
@click.option("--trials", type=click.IntRange(1, 10_000), default=24, show_default=True)
@click.option(
    "--loss",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="The share of the metric that may be lost.",
)
@click.option(
    "--metric", type=click.Choice(["hr@50", "ndcg@50", "mrr"]), default="ndcg@50", show_default=True
)
@click.option(
    "--form",
    type=click.Choice(["per candidate", "shared history"]),
    default="shared history",
    show_default=True,
    help="How candidates are scored where time is taken.",
)
@click.option("--figure", type=click.Path(dir_okay=False, path_type=Path), help="Draw latency by size here.")
@click.option(
    "--seed", type=int, default=1, show_default=True, help="Of the log, of the networks and of the search."
)
@bench_options.json_path
def tune(
    *,
    log: Path | None,
    shape_name: str,
    epochs: float,
    trial_epochs: float,
    trials: int,
    loss: float,
    metric: str,
    form: Any,
    figure: Path | None,
    seed: int,
    json_path: Path | None,
) -> None:
    """Search for compressions that are fast and small at a loss that is allowed.

    Layers, heads, channels, rank of the attention's maps, weights that layers share, bits, zeros in the table
    or product codes for it, or a student of fewer dimensions; two goals, latency and stored bytes, as shares
    of the trained network's. Accuracy is validation's while searching, the test's in the end. Kept in
    .tailrace/tuning: the same command goes on where it was stopped, with more trials after those there are.

    \b
    tailrace tune --trials 24 --json tune.json --figure tune.svg
    tailrace tune --log ml-1m.txt.gz --loss 0.02
    tailrace tune --shape quick --epochs 2 --trials 4
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from infra.bench import report as kept
    from infra.bench.table1.command import folder_of
    from infra.bench.table1.shapes import SHAPES
    from infra.bench.table1.steps import Steps, data
    from infra.progress import ProgressBar
    from infra.tuning import report
    from infra.tuning.study import Limits, Search

    shape = SHAPES[shape_name]
    trained = folder_of(shape_name, log, epochs, seed)
    whole = Steps(shape, trained, epochs, seed, console().print, log).baseline()
    limits = Limits(loss, metric, trial_epochs, trials)
    folder = home() / "tuning" / f"{trained.name}-{metric}-{loss:g}-{trial_epochs:g}-{form.split()[0]}"
    search = Search(
        folder,
        whole.ranker,
        whole.bytes,
        data(shape, seed, log, judged=2_000, part="validation"),
        limits,
        form=form,
        candidates=shape.candidates,
        seed=seed,
    )
    with ProgressBar(quiet=False) as bar:
        search.run(bar)
    tried = report.trials_of(search)
    front = report.front_of(search, whole.ranker, data(shape, seed, log))
    best = report.chosen(front)
    name = "a synthetic log" if log is None else log.name
    report.show(
        front,
        title=f"tune: {name}, {len(tried)} networks, at most {loss:.1%} of {metric} lost on validation; "
        f"shares are of the whole network, {form}",
    )
    if best is None:
        kept.note(f"no network lost at most {loss:.1%}: allow more, or teach longer (--trial-epochs)")
    if figure is not None:
        report.draw(tried, figure, limit=loss)
    kept.write(
        json_path,
        "tune",
        {
            "log": "synthetic" if log is None else log.name,
            "shape": shape_name,
            "form": form,
            "epochs": epochs,
            "seed": seed,
            "limits": asdict(limits),
            "chosen": best and best["recipe"],
            "front": front,
            "trials": tried,
        },
    )
