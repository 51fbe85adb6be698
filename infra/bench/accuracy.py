"""Accuracy on a benchmark file: train, release, evaluate each seed from what was released; mean and spread.
With --as-one the networks of all seeds are one version and have one figure.

Leave-one-out over the full catalogue, seen items filtered. (a) train: everything is fitted without a
user's last two items. (b) train+validation: fitted anew, after selection, with the last but one too.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from infra.bench import options as bench_options
from infra.bench.report import table, write
from infra.commands import options

if TYPE_CHECKING:
    from compression.releases.registry import Manifest, Registry
    from compression.retrieval.release import Fitted

PREDICTORS: Final = {
    "popularity": "popularity",
    "item_to_item": "item-to-item",
    "recent": "recent",
    "transitions": "counts alone",
    "retrieval": "model alone",
    "fusion": "fusion",
}
FIGURES: Final = ("hr@10", "ndcg@10", "hr@50", "ndcg@50", "mrr")
CHOICES: Final[dict[str, tuple[Fitted, ...]]] = {
    "a": ("train",),
    "b": ("train+validation",),
    "both": ("train", "train+validation"),
}


@click.command(name="accuracy")
@click.option(
    "--log",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="Item lists or a Taobao-format log, gzip or not.",
)
@options.registry
@click.option("--recipe", default="ml-1m", show_default=True, help="ml-1m, beauty, laptop, full or a file.")
@click.option("--seeds", default="1,2,3", show_default=True, help="Whole numbers with commas between.")
@click.option("--as-one", is_flag=True, help="One version with the networks of all seeds: no spread.")
@click.option("--protocol", type=click.Choice(list(CHOICES)), default="both", show_default=True)
@click.option(
    "--max-core-minutes", type=click.FloatRange(0, min_open=True), help="The recipe says otherwise."
)
@click.option("--epochs", type=click.IntRange(1), help="At most so many; the recipe says otherwise.")
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where trainings are kept that a killed run goes on with; beside the registry otherwise.",
)
@bench_options.json_path
def command(
    *,
    log: Path,
    registry: Path,
    recipe: str,
    seeds: str,
    as_one: bool,
    protocol: str,
    max_core_minutes: float | None,
    epochs: int | None,
    state: Path | None,
    json_path: Path | None,
) -> None:
    """Train, release and evaluate a retrieval model and its fusion with counts, over seeds.

    Started again after a kill it goes on after the last whole epoch; what is trained already is only
    evaluated.

    \b
    tailrace bench accuracy --log ml-1m.txt.gz --recipe ml-1m --seeds 1,2,3 --json accuracy.json
    tailrace bench accuracy --log Beauty.txt.gz --recipe beauty --seeds 1 --protocol a
    tailrace bench accuracy --log ml-1m.txt.gz --protocol a --as-one
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from compression.errors import ArtefactInvalid
    from compression.logs.dataset import read_log
    from compression.logs.log_reader import LogInvalid
    from compression.releases.provenance import sha256_of
    from compression.releases.registry import Registry
    from compression.retrieval.fit import FitSettings, fit
    from compression.retrieval.recipe import RecipeInvalid, change, load_recipe
    from infra.progress import ProgressBar

    changes = {"max_core_minutes": max_core_minutes, "epochs": epochs}
    runs: list[dict[str, Any]] = []
    try:
        chosen = change(
            load_recipe(recipe), {name: one for name, one in changes.items() if one is not None}, recipe
        )
        read = read_log(log)
        numbers = _seeds(seeds)
        for together in [numbers] if as_one else [[seed] for seed in numbers]:
            settings = FitSettings(
                recipe=chosen,
                seeds=together,
                registry=registry,
                state=state or registry.parent / "trainings",
                log_name=log.name,
                log_sha256=sha256_of(log),
                protocols=CHOICES[protocol],
            )
            with ProgressBar(quiet=False) as bar:
                released = fit(read, settings, bar)
            judged = [_judged(Registry(registry), one, log) for one in released]
            runs += judged
            named = " + ".join(map(str, together))
            click.echo(f"seed {named}: " + ", ".join(_line(run) for run in judged))
    except (RecipeInvalid, LogInvalid, ArtefactInvalid) as error:
        raise click.ClickException(str(error)) from None
    for fitted in CHOICES[protocol]:
        _show([run for run in runs if run["fitted"] == fitted], log.name, fitted)
    write(json_path, "accuracy", {"log": log.name, "recipe": chosen.model_dump(mode="json"), "runs": runs})


def _judged(registry: Registry, manifest: Manifest, log: Path) -> dict[str, Any]:
    """The figures of a version as it lies in the registry, which must be those of the training."""
    from compression.logs.dataset import read_log
    from compression.retrieval.release import load_config, load_networks
    from compression.retrieval.table import evaluate

    artefact = registry.open(manifest.version, kind="retrieval")
    report = evaluate(
        load_networks(artefact), load_config(artefact), read_log(log).sequences, artefact.vocabulary()
    )
    differing = [name for name in PREDICTORS if report.get(name) != manifest.metrics.get(name)]
    if differing:
        raise click.ClickException(f"{manifest.version}: released and trained differ in {differing}")
    data = manifest.data
    kept = ("seed", "seeds", "core_minutes", "minutes", "epochs", "selected_epochs", "validation", "stopped")
    return {"version": manifest.version, **{name: data[name] for name in kept}, **report}


def _line(run: dict[str, Any]) -> str:
    best = run["fusion" if "fusion" in run else "retrieval"]
    epochs = " + ".join(map(str, run["epochs"]))
    return (
        f"{run['version']} ({run['fitted']}) NDCG@10 {best['ndcg@10']:.4f} after {epochs} epochs, "
        f"{run['core_minutes']:.1f} core minutes"
    )


def _show(runs: list[dict[str, Any]], log: str, fitted: Fitted) -> None:
    names = [name for name in PREDICTORS if name in runs[0]]
    rows = [
        [PREDICTORS[name], *(_spread([run[name][one] for run in runs]) for one in FIGURES)] for name in names
    ]
    letter = "a" if fitted == "train" else "b"
    minutes = _spread([run["core_minutes"] for run in runs], digits=1)
    title = f"({letter}) {fitted}: {log}, seed {_named(runs)}, {minutes} core minutes each"
    table(title, ["predictor", *(one.upper() for one in FIGURES)], rows)


def _named(runs: list[dict[str, Any]]) -> str:
    return ", ".join(" + ".join(map(str, run["seeds"])) for run in runs)


def _spread(values: list[float], digits: int = 4) -> str:
    """Mean and, of more than one, standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _seeds(given: str) -> list[int]:
    try:
        return [int(seed) for seed in given.split(",")]
    except ValueError:
        raise click.UsageError(f"--seeds {given!r}: whole numbers with commas between are needed") from None
