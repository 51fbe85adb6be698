"""Where tables and remarks are printed."""

from __future__ import annotations

from rich.console import Console

WIDTH_OFF_TERMINAL = 140


def console() -> Console:
    """Standard output, wide enough for a table where that is a file or a pipe."""
    found = Console()
    return found if found.is_terminal else Console(width=WIDTH_OFF_TERMINAL)
