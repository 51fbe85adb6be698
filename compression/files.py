"""Reading files that somebody else may have put there, and writing whole files or none."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from compression.errors import ArtefactInvalid


def read_plain(path: Path, limit: int, version: str) -> bytes:
    """At most `limit` + 1 bytes of a regular file: a link or a device is refused, not followed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ArtefactInvalid(f"{version}: {path.name} cannot be read: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ArtefactInvalid(f"{version}: {path.name} is not a plain file")
        return file.read(limit + 1)


def write_whole(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace a file in one atomic step; its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    work = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        work.chmod(mode)
        work.replace(path)
        fsync(path.parent)
    finally:
        work.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
