"""Where what we start keeps its files: `.tailrace/` in the checkout, or `$TAILRACE_HOME`."""

from __future__ import annotations

import os
from pathlib import Path

INFRA = Path(__file__).resolve().parent.parent


def home() -> Path:
    """The folder of local state; an installed package without a checkout uses the current directory."""
    if given := os.environ.get("TAILRACE_HOME"):
        return Path(given).resolve()
    checkout = INFRA.parent
    base = checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()
    return base / ".tailrace"


def registry_dir() -> Path:
    """Where released models are, unless a command or `$TAILRACE_REGISTRY` says otherwise."""
    return home() / "models"


def local_dir() -> Path:
    """Data of the broker and Redis that `tailrace up` starts, and the file that says where they are."""
    return home() / "local"
