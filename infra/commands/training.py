"""`tailrace synth`, `tailrace evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from infra.commands import options
from infra.console import console, print_json

SPLITS = ("leave-one-out", "temporal")
RECIPES = ("laptop", "tiny", "full")
PRECISIONS = ("f32", "bf16")

_FILE = click.Path(dir_okay=False, path_type=Path)
_LOG = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)


@click.command()
@click.argument("out", type=_FILE)
@click.option("--events", type=click.IntRange(1), default=200_000, show_default=True)
@click.option("--users", type=click.IntRange(1), default=5_000, show_default=True)
@click.option("--items", type=click.IntRange(1), default=5_000, show_default=True)
@click.option("--categories", type=click.IntRange(1), default=100, show_default=True)
@options.seed()
@click.option("--overwrite", is_flag=True, help="Write over a file that is there.")
@options.one_json
def synth(
    *,
    out: Path,
    events: int,
    users: int,
    items: int,
    categories: int,
    seed: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a Taobao-format log with learnable structure to OUT (.csv or .csv.gz).

    \b
    tailrace synth clicks.csv
    tailrace synth clicks.csv.gz --events 1000000 --users 20000 --items 20000
    """
    import time

    from compression.logs.synth import SynthSettings, synthesize, write_log

    if out.exists() and not overwrite:
        raise click.ClickException(f"{out} is there already: --overwrite writes over it")
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
@options.seed(default=7)
@options.one_json
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
        artefact = Registry(registry).open(version, serves=False)
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


def _print_report(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(report)
    else:
        print_metrics(report)


def print_metrics(report: dict[str, Any]) -> None:
    """Tables for a person."""
    from rich.table import Table

    from compression.evaluation.tables import tables

    if not report.get("targets"):
        click.echo("nothing to judge by: no user of the log has enough events")
        return
    click.echo(f"{report['targets']:,} targets, {report['split']}")
    for found in tables(report):
        table = Table(title=found.title, title_justify="left")
        for place, head in enumerate(found.heads):
            table.add_column(head, justify="right" if place else "left")
        for row in found.rows:
            table.add_row(*row)
        console().print(table)
