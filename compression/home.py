"""Where this machine keeps local state: `.tailrace/` in the checkout, or `$TAILRACE_HOME`."""

from __future__ import annotations

import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def home() -> Path:
    """The folder of local state; an installed package without a checkout uses the current directory."""
    if given := os.environ.get("TAILRACE_HOME"):
        return Path(given).resolve()
    base = CHECKOUT if (CHECKOUT / "pyproject.toml").is_file() else Path.cwd()
    return base / ".tailrace"
