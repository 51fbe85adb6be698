"""Options that benches share, and the events they send."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import click

from infra.commands import options

Command = Callable[..., Any]


def json_path(command: Command) -> Command:
    return click.option(
        "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Keep the figures here."
    )(command)


def log(command: Command) -> Command:
    return click.option(
        "--log",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="A Taobao-format log; a synthetic one otherwise.",
    )(command)


seed = options.seed()


def ranking(clicks: int) -> Callable[[Command], Command]:
    """What every bench takes that ranks a log's events in its own process: --clicks, --log, --registry,
    --seed and --json."""

    def with_options(command: Command) -> Command:
        for option in (json_path, seed, options.registry, log):
            command = option(command)
        return click.option("--clicks", type=click.IntRange(1_000), default=clicks, show_default=True)(
            command
        )

    return with_options


def note_unreleased(registry: Path) -> None:
    """Say what answers where no version is released: the worker runs, and no network is measured."""
    from compression.releases.registry import Registry
    from infra.bench import report

    if Registry(registry).state() is None:
        report.note(
            f"No version is released in {registry}: lists come from popularity, no network ranks. "
            "`tailrace retrain --log FILE` releases one, --registry names another folder."
        )


def events(log: Path | None, limit: int, seed: int) -> tuple[list[Any], str]:
    """Events to send, and what to call them."""
    from compression.logs.log_reader import iter_events

    if log is not None:
        return list(islice(iter_events(log), limit)), log.name
    from compression.logs.synth import SynthSettings, synthesize, write_log

    with tempfile.TemporaryDirectory(prefix="tailrace-synth-") as folder:
        path = Path(folder) / "synthetic.csv"
        users = max(10, limit // 25)
        made = SynthSettings(events=limit, users=users, items=2_000, categories=50, seed=seed)
        write_log(path, synthesize(made))
        return list(iter_events(path)), f"synthetic, seed {seed}"
