"""Which code and which libraries made a version."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Iterable
from pathlib import Path


def libraries(names: Iterable[str]) -> dict[str, str]:
    """Their versions as they are installed."""
    return {name: importlib.metadata.version(name) for name in names}


def git_revision() -> str | None:
    """Of the code that runs, where it is a checkout."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
