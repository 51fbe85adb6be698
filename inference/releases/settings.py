"""What a process does with the releases of one alias."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ReleaseRules:
    """`alias` may also be a version: that one serves then.

    A new version ranks `check_requests` recent requests before it serves, each few of them within
    `check_limit_s`. `keep_previous` keeps the version before open, for a rollback at once.
    """

    registry: Path
    alias: str = "serving"
    check_requests: int = 64
    check_limit_s: float = 2.0
    keep_previous: bool = True
