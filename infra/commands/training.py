"""`tailrace synth`, `tailrace evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from infra.commands import options

SPLITS = ("leave-one-out", "temporal")
RECIPES = ("laptop", "tiny", "full")
PRECISIONS = ("f32", "bf16")

_FILE = click.Path(dir_okay=False, path_type=Path)
_LOG = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)
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

    from compression.logs.synth import SynthSettings, synthesize, write_log

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
        print_json({"log": str(out), "events": events, "seed": seed, "seconds": round(seconds, 2)})
    else:
        click.echo(f"{out}: {events:,} events of {users:,} users in {seconds:.1f} s")


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
    from compression.evaluation.evaluate import evaluate as run
    from compression.evaluation.scoring import ArtefactScorer
    from compression.logs.dataset import read_log
    from compression.logs.dataset import split as split_sequences
    from compression.logs.log_reader import LogInvalid
    from compression.releases.registry import ArtefactInvalid, Registry

    try:
        artefact = Registry(registry).open(version, kind=None)
        sequences = read_log(log).sequences
        if artefact.manifest.kind == "retrieval":
            from compression.retrieval import release, table

            report = table.evaluate(
                release.load_networks(artefact),
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


commands: list[click.Command] = [synth, evaluate]


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


def _print_report(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(report)
    else:
        print_metrics(report)


def print_metrics(report: dict[str, Any]) -> None:
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
    _print_by_behavior(report.get("by_behavior", {}))
    _print_lists(report.get("lists", {}))


def _print_by_behavior(found: dict[str, Any]) -> None:
    """Nothing where all targets are of one kind, as in logs that know only one."""
    from rich.table import Table

    from infra.console import console

    if len(found) < 2:
        return
    table = Table(title="By what the user did")
    for column in ("target", "targets", "HR@10", "NDCG@10", "HR@10 of 50", "NDCG@10 of 50"):
        table.add_column(column, justify="left" if column == "target" else "right")
    for name, figures in found.items():
        shown = [figures[head][cut] for head in ("retrieval", "ranking_50") for cut in ("hr@10", "ndcg@10")]
        table.add_row(name, f"{figures['targets']:,}", *(f"{value:.4f}" for value in shown))
    console().print(table)


def _print_lists(found: dict[str, Any]) -> None:
    """Of what was trained only: an evaluation of a version does not weigh counts anew."""
    from rich.table import Table

    from infra.console import console

    if not found.get("targets"):
        return
    table = Table(title=f"As served, of 50 candidates; a miss counts: {found['targets']:,} targets")
    shown = ("hr@1", "hr@10", "ndcg@10", "mrr")
    for column in ("score", *(name.upper() for name in shown)):
        table.add_column(column, justify="left" if column == "score" else "right")
    for words, name in (("network alone", "network"), ("with online counts", "fused")):
        table.add_row(words, *(f"{found[name][cut]:.4f}" for cut in shown))
    console().print(table)


def print_json(value: dict[str, Any]) -> None:
    import orjson

    click.echo(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode())
