"""`tailrace synth`, `tailrace retrain`, `tailrace evaluate`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from infra.commands import options

if TYPE_CHECKING:
    from compression.pipeline import Retrained

SPLITS = ("leave-one-out", "temporal")
RECIPES = ("laptop", "tiny", "full")

_FILE = click.Path(dir_okay=False, path_type=Path)
_LOG = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.command()
@click.argument("out", type=_FILE)
@click.option("--events", type=click.IntRange(1), default=200_000, show_default=True)
@click.option("--users", type=click.IntRange(1), default=5_000, show_default=True)
@click.option("--items", type=click.IntRange(1), default=5_000, show_default=True)
@click.option("--categories", type=click.IntRange(1), default=100, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True)
@_json
def synth(
    *, out: Path, events: int, users: int, items: int, categories: int, seed: int, as_json: bool
) -> None:
    """Write a Taobao-format log with learnable structure to OUT (.csv or .csv.gz).

    \b
    tailrace synth clicks.csv
    tailrace synth clicks.csv.gz --events 1000000 --users 20000 --items 20000
    """
    import time

    from compression.synth import SynthSettings, synthesize, write_log

    started = time.monotonic()
    try:
        log = synthesize(SynthSettings(events, users, items, categories, seed))
        write_log(out, log)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{out} cannot be written: {error.strerror}") from None
    seconds = time.monotonic() - started
    if as_json:
        _print_json({"log": str(out), "events": events, "seed": seed, "seconds": round(seconds, 2)})
    else:
        click.echo(f"{out}: {events:,} events of {users:,} users in {seconds:.1f} s")


@click.command()
@click.option("--log", type=_LOG, required=True, help="Taobao-format log or item lists, gzip or not.")
@options.registry
@click.option("--recipe", type=click.Choice(RECIPES), default="laptop", show_default=True)
@click.option("--epochs", type=click.IntRange(1), help="At most so many; the recipe says otherwise.")
@click.option(
    "--max-minutes", type=click.FloatRange(0, min_open=True), help="Of training; the recipe says otherwise."
)
@click.option("--max-events", type=click.IntRange(1), help="Keep the last rows of a longer log.")
@click.option("--split", type=click.Choice(SPLITS), default="leave-one-out", show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--alias", default="serving", show_default=True, help="Alias that will stand for the version.")
@click.option("--no-promote", is_flag=True, help="Publish only; the alias stays as it is.")
@click.option("--bootstrap", help="Announce the release on this broker's model-releases topic.")
@options.topic_suffix
@_json
def retrain(
    *,
    log: Path,
    registry: Path,
    recipe: str,
    epochs: int | None,
    max_minutes: float | None,
    max_events: int | None,
    split: Any,
    seed: int,
    alias: str,
    no_promote: bool,
    bootstrap: str | None,
    topic_suffix: str,
    as_json: bool,
) -> None:
    """Train on a log and release the model: read, train, evaluate, export, verify, publish, promote.

    \b
    tailrace retrain --log clicks.csv
    tailrace retrain --log UserBehavior.csv.gz --recipe full --max-minutes 30
    tailrace retrain --log clicks.csv --bootstrap localhost:9092 --json
    """
    # Beside a busy broker, threads that spin while they wait for one another cost several times the work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _need_training_extra()
    from compression.dataset import MAX_EVENTS
    from compression.export import ParityError
    from compression.log_reader import LogInvalid
    from compression.pipeline import RetrainSettings
    from compression.pipeline import retrain as run
    from compression.registry import ArtefactInvalid
    from compression.train import RECIPES as RECIPE_NAMED

    chosen = RECIPE_NAMED[recipe]
    if epochs is not None:
        chosen = replace(chosen, epochs=epochs)
    if max_minutes is not None:
        chosen = replace(chosen, max_minutes=max_minutes)
    settings = RetrainSettings(
        log=log,
        registry=registry,
        recipe=chosen,
        split=split,
        seed=seed,
        max_events=max_events or MAX_EVENTS,
        alias=None if no_promote else alias,
    )
    try:
        with ProgressBar(quiet=as_json) as bar:
            done = run(settings, bar)
    except (LogInvalid, ArtefactInvalid, ParityError) as error:
        raise click.ClickException(str(error)) from None
    announced = bool(bootstrap and done.alias) and _announce(str(bootstrap), topic_suffix, done)
    summary = _summary(done) | {"announced": announced}
    if as_json:
        _print_json(summary)
    else:
        _print_summary(summary, registry)


@click.command()
@click.option("--log", type=_LOG, required=True, help="Taobao-format log or item lists, gzip or not.")
@options.registry
@click.option("--version", default="serving", show_default=True, help="Version or alias.")
@click.option("--split", type=click.Choice(SPLITS), default="leave-one-out", show_default=True)
@click.option(
    "--limit", type=click.IntRange(1), help="Targets at most: 5,000 for a ranking, all for a retrieval model."
)
@click.option(
    "--filter-seen",
    is_flag=True,
    help="Rank no item over the full catalogue that the user has had, as published figures on films do.",
)
@click.option("--seed", type=int, default=7, show_default=True)
@_json
def evaluate(
    *,
    log: Path,
    registry: Path,
    version: str,
    split: Any,
    limit: int | None,
    filter_seen: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Judge a released model on a log, beside popularity, item-to-item, recent items and transition
    counts, and fused with the counts. A retrieval model is judged over the full catalogue only.

    LOG is Taobao-format, or lines of `user item` or `user item item …` (MovieLens-1M and Amazon as
    published).

    \b
    tailrace evaluate --log clicks.csv
    tailrace evaluate --log ml-1m.txt.gz --filter-seen --limit 100000
    tailrace evaluate --log Beauty.txt.gz --filter-seen --version 20171203T101500-3f9c
    tailrace evaluate --log clicks.csv --version 20171203T101500-3f9c --split temporal --json
    """
    from compression.dataset import read_log
    from compression.dataset import split as split_sequences
    from compression.evaluate import evaluate as run
    from compression.log_reader import LogInvalid
    from compression.registry import ArtefactInvalid, Registry
    from compression.scoring import ArtefactScorer

    try:
        artefact = Registry(registry).open(version, kind=None)
        sequences = read_log(log).sequences
        if artefact.manifest.kind == "retrieval":
            from compression.retrieval import release, table

            report = table.evaluate(
                release.load_network(artefact),
                release.load_config(artefact),
                sequences,
                artefact.vocabulary(),
                split_name=split,
                limit=limit or table.ALL,
                seed=seed,
                filter_seen=filter_seen,
            )
            _print_report({"version": artefact.version, "log": str(log)} | report, as_json)
            return
    except (ArtefactInvalid, LogInvalid) as error:
        raise click.ClickException(str(error)) from None
    shape = artefact.manifest.model
    report = run(
        ArtefactScorer(artefact),
        sequences,
        split_sequences(sequences, split),
        artefact.vocabulary(),
        max_history=shape.max_history,
        limit=limit or 5_000,
        seed=seed,
        filter_seen=filter_seen,
    )
    _print_report({"version": artefact.version, "log": str(log)} | report, as_json)


commands: list[click.Command] = [synth, retrain, evaluate]


def _announce(bootstrap: str, topic_suffix: str, done: Retrained) -> bool:
    """Say which version the alias now stands for. False, with a sentence on stderr, when the broker
    cannot be reached: the version is promoted all the same."""
    from infra.announce import announce
    from topics.messages import ModelReleased

    message = ModelReleased(
        version=done.manifest.version,
        uri=done.path.resolve().as_uri(),
        sha256=done.manifest_sha256,
        stage="serving",
    )
    error = announce(bootstrap, topic_suffix, str(done.alias), [message])
    if error is not None:
        click.echo(error, err=True)
    return error is None


class ProgressBar:
    """One line per step, with the time it will still take."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True, quiet=quiet),
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, step: str, fraction: float, note: str) -> None:
        if step not in self._tasks:
            self._tasks[step] = self._progress.add_task(step, total=1.0, note=note)
        self._progress.update(self._tasks[step], completed=fraction, note=note)


def _need_training_extra() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("torch", "onnx", "onnxruntime", "safetensors") if not find_spec(name)]
    if missing:
        raise click.ClickException(
            f"training needs {', '.join(missing)}: pip install 'tailrace[train]' brings what is missing"
        )


def _summary(done: Retrained) -> dict[str, Any]:
    manifest = done.manifest
    return {
        "version": manifest.version,
        "alias": done.alias,
        "path": str(done.path),
        "manifest_sha256": done.manifest_sha256,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "model": manifest.model.model_dump(),
        "data": manifest.data,
        "metrics": manifest.metrics,
        "seconds": done.seconds,
    }


def _print_summary(summary: dict[str, Any], registry: Path) -> None:
    data = summary["data"]
    click.echo(f"{summary['version']} in {registry}: {summary['bytes'] / 1e6:.1f} MB")
    if data["bad_rows"]:
        click.echo(f"{data['bad_rows']} bad rows of {data['log']} were left out")
    if data["truncated"]:
        click.echo(f"{data['log']}: {data['truncated']}")
    _print_metrics(summary["metrics"])
    if summary["alias"]:
        click.echo(f"{summary['alias']} now stands for {summary['version']}")


def _print_report(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(report)
    else:
        _print_metrics(report)


def _print_metrics(report: dict[str, Any]) -> None:
    from rich.table import Table

    from infra.console import console

    if not report.get("targets"):
        click.echo("nothing to judge by: no user of the log has enough events")
        return
    counted = ("transitions", "fusion") if "fusion" in report else ()
    for title, suffix, names in (
        ("Full catalogue", "", ("retrieval", "popularity", "item_to_item", "recent", *counted)),
        ("Among 50 candidates", "_50", ("ranking", "popularity", "item_to_item", "recent")),
    ):
        table = Table(title=f"{title}: {report['targets']:,} targets, {report['split']}")
        table.add_column("predictor")
        if names[0] + suffix not in report:
            continue
        figures = [report[name + suffix] for name in names]
        for figure in figures[0]:
            table.add_column(figure.upper(), justify="right")
        for name, values in zip(names, figures, strict=True):
            table.add_row(name.replace("_", "-"), *(f"{value:.4f}" for value in values.values()))
        console().print(table)


def _print_json(value: dict[str, Any]) -> None:
    import orjson

    click.echo(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode())
