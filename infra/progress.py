"""How far a long command is, on standard error."""

from __future__ import annotations

from typing import Any


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
