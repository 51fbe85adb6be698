"""Folders for what is kept between starts: nobody else may write to them, so what lies there is ours."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from inference.errors import ModelUnavailable


def own_folder(folder: Path) -> Path:
    """A folder that this user alone can write to, made where it is missing; else `ModelUnavailable`."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise ModelUnavailable(f"nothing can be kept in {folder}: {error.strerror}") from error
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ModelUnavailable(f"{folder} can be written by others: nothing is loaded from it")
    return folder


def user_cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "tailrace"
