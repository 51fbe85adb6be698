"""Where what we start keeps its files, under `compression.home`."""

from __future__ import annotations

from pathlib import Path

from compression.home import home

INFRA = Path(__file__).resolve().parent.parent


def registry_dir() -> Path:
    """Where released models are, unless a command or `$TAILRACE_REGISTRY` says otherwise."""
    return home() / "models"


def local_dir() -> Path:
    """Data of the broker and Redis that `tailrace up` starts, and the file that says where they are."""
    return home() / "local"
