"""Where tables, remarks and JSON are printed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import click
import orjson

if TYPE_CHECKING:
    from rich.console import Console

WIDTH_OFF_TERMINAL = 140


def console() -> Console:
    """Standard output, wide enough for a table where that is a file or a pipe."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=WIDTH_OFF_TERMINAL)


def print_json(value: Any) -> None:
    """One line on standard output, for a program to read."""
    click.echo(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode())


def log_to_stderr(level: str, *chatty: str) -> None:
    """One line an event. Libraries that are `chatty` tell what is wrong only, unless all is to be told."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname).1s %(name)s: %(message)s")
    if level != "DEBUG":
        for name in chatty:
            logging.getLogger(name).setLevel(logging.WARNING)
