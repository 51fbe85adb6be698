"""The registry's side of a lease: who held it later shuts out who held it before.

    fences/<alias>    the highest token that was seen, in decimal

A holder shows its token when it begins and again when it promotes; a lower one than was seen is
`Superseded`. So a process that was paused past its lease changes nothing, whatever it still believes.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from compression.errors import ReleaseRefused
from compression.files import write_whole
from compression.releases.aliases import check_name

_WAIT_S: Final = 30.0
_POLL_S: Final = 0.05


class Superseded(ReleaseRefused):
    """A later holder of the lease has been here: what this one made is not promoted."""


class Fence:
    """The fence of one alias of a registry."""

    def __init__(self, registry: Path, alias: str) -> None:
        check_name(alias)
        self._alias = alias
        self._path = registry / "fences" / alias

    def seen(self) -> int:
        """The highest token so far, 0 where there was none."""
        try:
            return int(self._path.read_text())
        except FileNotFoundError:
            return 0
        except ValueError:
            raise ReleaseRefused(f"{self._path} does not hold a token") from None

    @contextmanager
    def passed(self, token: int) -> Iterator[None]:
        """Nobody else passes while the body runs. `Superseded` for a token below the highest seen."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_name(f".{self._alias}.lock").open("w") as lock:
            self._take(lock)
            highest = self.seen()
            if token < highest:
                raise Superseded(
                    f"another retraining of {self._alias} began after this one: its token is {highest}, "
                    f"this one's {token}"
                )
            if token > highest:
                write_whole(self._path, b"%d" % token)
            yield

    def _take(self, lock: IO[str]) -> None:
        # Not for ever: a process that was paused inside the body would hold up everybody.
        deadline_s = time.monotonic() + _WAIT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise ReleaseRefused(
                        f"another process has been promoting {self._alias} for {_WAIT_S:.0f} s; is it paused?"
                    ) from None
                time.sleep(_POLL_S)
