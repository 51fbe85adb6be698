"""Where tables, remarks and JSON are printed."""

from __future__ import annotations

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
