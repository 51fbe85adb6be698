"""Reading files that somebody else may have put there, and writing whole files or none."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tempfile
from pathlib import Path
from typing import Final

from compression.errors import ArtefactInvalid

# What is hashed stays in a processor's own cache meanwhile.
_PIECE: Final = 128 * 1024


def read_plain(path: Path, limit: int, version: str) -> bytes:
    """At most `limit` + 1 bytes of a regular file: a link or a device is refused, not followed."""
    with _plain(path, version) as file:
        return file.read(limit + 1)


def hash_plain(path: Path, limit: int, version: str) -> tuple[str, int]:
    """SHA-256 and number of what `read_plain` returns, with no more than a piece of it in memory."""
    digest, size, piece = hashlib.sha256(), 0, memoryview(bytearray(_PIECE))
    with _plain(path, version) as file:
        while size <= limit and (count := file.readinto(piece[: limit + 1 - size])):
            digest.update(piece[:count])
            size += count
    return digest.hexdigest(), size


def _plain(path: Path, version: str) -> io.BufferedReader:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ArtefactInvalid(f"{version}: {path.name} cannot be read: {error.strerror}") from None
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise ArtefactInvalid(f"{version}: {path.name} is not a plain file")
    return file


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
