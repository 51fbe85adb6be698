"""Preparing versions in a process of their own, behind everything that serves.

What takes long in a swap (verifying, looking at graphs, optimising them, training an index) needs no
object that lives here, and would hold the interpreter's lock and a processor that requests want. So it is
done by a child that the system lets run when nobody else wants to. The child is kept for a while: most of
what it does for its first version is importing libraries.

    python -m inference.preparing idle FD    one `Wanted` a line in, one `Prepared` or reason a line out;
                                             the first byte behind FD says whether anybody is served
                                             meanwhile, eight more how many seconds of work there were
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final, Literal

from inference.errors import ModelUnavailable

log = logging.getLogger(__name__)

Priority = Literal["idle", "ordinary"]

# What has hardly had a turn for so long, on a machine that is never idle, is begun again like any other work.
PATIENCE_S: Final = 30.0
_HARDLY: Final = 0.03
_LONGEST_S: Final = 600.0
# Even what runs when nobody else wants to is felt by who does: a processor that has such work to go on with
# does not look for threads that wait for another one. So it works for about this long at a time, and for no
# more than a share of the time: a smaller one while somebody is served (LOG.md).
_TURN_S: Final = 0.005
_SHARE: Final = 0.3
_SHARE_BESIDE: Final = 0.1
_NOBODY, _SOMEBODY = b"\0", b"\1"
_HAD_S: Final = struct.Struct("<d")
_LOOK_S: Final = 0.1
_LEAVES_AFTER_S: Final = 120.0
_PR_SET_PDEATHSIG: Final = 1
_MOST_BYTES: Final = 2**20


class Preparer:
    """`inference.prepared.prepare` in a child process. Safe to call from several threads."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._child: subprocess.Popen[bytes] | None = None
        self._complaints: IO[bytes] | None = None
        self._told: IO[bytes] | None = None
        self._using = threading.RLock()

    def prepare(
        self, wanted: str, stop: Callable[[], bool], serving: Callable[[], bool] = lambda: True
    ) -> str:
        """JSON of a `Wanted` in, of a `Prepared` out. Waits in short steps as long as `stop` does not say
        otherwise; `serving` is asked at each of them whether anybody was served since the last. Raises
        `ModelUnavailable` where the version is refused, and `OSError` where no child will do it."""
        with self._using:
            answer = self._ask(wanted, stop, serving, "idle")
            if answer is None:
                log.warning(
                    "Preparing a version had hardly a turn in %g s: it is begun again like any work",
                    self._patience_s,
                )
                answer = self._ask(wanted, stop, serving, "ordinary")
                self.close()
        if answer is None:
            raise OSError(f"preparing a version took more than {_LONGEST_S:g} s")
        told: dict[str, str] = json.loads(answer)
        if "refused" in told:
            raise ModelUnavailable(told["refused"])
        return answer

    def close(self) -> None:
        """End the child; another is started when it is needed."""
        with self._using:
            if self._child is None:
                return
            self._child.kill()
            for pipe in (self._child.stdin, self._child.stdout, self._complaints, self._told):
                if pipe is not None:
                    pipe.close()
            self._child.wait()
            self._child = None

    def _ask(
        self,
        wanted: str,
        stop: Callable[[], bool],
        serving: Callable[[], bool],
        priority: Priority,
    ) -> str | None:
        """What the child says; None, and no child any more, where it has too few turns, or takes too long."""
        child = self._living(priority)
        assert child.stdin is not None and child.stdout is not None
        answer = None
        try:
            os.write(child.stdin.fileno(), wanted.encode() + b"\n")
            answer = self._read_line(child.stdout.fileno(), stop, serving, starves=priority == "idle")
        finally:
            if answer is None:
                self.close()
        return answer

    def _living(self, priority: Priority) -> subprocess.Popen[bytes]:
        if self._child is not None and (self._child.poll() is not None or priority == "ordinary"):
            self.close()
        if self._child is None:
            ours = str(Path(__file__).resolve().parents[1])
            paths = os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH"))))
            self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the child
            self._told = tempfile.TemporaryFile()  # noqa: SIM115  # too
            # Not asyncio's, which would copy this process's page tables: subprocess has vfork.
            self._child = subprocess.Popen(
                [sys.executable, "-m", "inference.preparing", priority, str(self._told.fileno())],
                pass_fds=[self._told.fileno()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                env={**os.environ, "PYTHONPATH": paths},
            )
        return self._child

    def _read_line(
        self, descriptor: int, stop: Callable[[], bool], serving: Callable[[], bool], *, starves: bool
    ) -> str | None:
        assert self._told is not None
        told = b""
        since_s = time.monotonic()
        ends_s, before_s = since_s + _LONGEST_S, self._had_s()
        while not told.endswith(b"\n"):
            if stop():
                raise ModelUnavailable("not needed any more")
            os.pwrite(self._told.fileno(), _SOMEBODY if serving() else _NOBODY, 0)
            now_s = time.monotonic()
            if now_s > ends_s:
                return None
            if starves and now_s > since_s + self._patience_s:
                had_s = self._had_s()
                if had_s - before_s < _HARDLY * (now_s - since_s):
                    return None
                since_s, before_s = now_s, had_s
            if not select.select([descriptor], [], [], _LOOK_S)[0]:
                continue
            part = os.read(descriptor, _MOST_BYTES)
            if not part:
                raise OSError(f"the process that prepares versions ended: {self._last_complaint()}")
            told += part
        return told.decode()

    def _had_s(self) -> float:
        """How much of a processor a child that works when nobody else wants to has had."""
        assert self._told is not None
        told = os.pread(self._told.fileno(), _HAD_S.size, 1)
        return float(_HAD_S.unpack(told)[0]) if len(told) == _HAD_S.size else 0.0

    def _last_complaint(self) -> str:
        assert self._complaints is not None
        self._complaints.seek(0)
        return self._complaints.read().decode(errors="replace").strip().rpartition("\n")[2]


def main() -> None:
    """Until nobody wants anything for a while, or whoever wanted it is gone."""
    _end_with_parent()
    if sys.argv[1] == "idle" and hasattr(os, "SCHED_IDLE"):
        worker = os.fork()
        if worker:
            _supervise(worker, int(sys.argv[2]))
            return
        _end_with_parent()
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    _work()


def _work() -> None:
    # Not above: importing takes longer than many a version.
    from inference import memory
    from inference.prepared import Wanted, prepare

    # Pages that were made anew for each file were half of the system's time here (LOG.md).
    memory.keep_freed()
    while select.select([sys.stdin], [], [], _LEAVES_AFTER_S)[0]:
        wanted = sys.stdin.readline()
        if not wanted:
            return
        try:
            answer = prepare(Wanted.from_json(wanted)).to_json()
        except ModelUnavailable as error:
            answer = json.dumps({"refused": str(error)})
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def _supervise(worker: int, told: int) -> None:
    """See that a process pauses after what it has had of a processor, whatever library it is in. From here,
    as in the process that serves it would take the interpreter's lock at every turn. `told`: a descriptor,
    behind which is said whether anybody is served, and what the process has had."""
    for pipe in (0, 1):
        os.close(pipe)
    ran_s = _ran_s(worker)
    while os.waitpid(worker, os.WNOHANG) == (0, 0):
        before_s, ran_s = ran_s, _ran_s(worker)
        os.pwrite(told, _HAD_S.pack(ran_s), 1)
        if ran_s > before_s:
            os.kill(worker, signal.SIGSTOP)
            share = _SHARE if os.pread(told, 1, 0) == _NOBODY else _SHARE_BESIDE
            time.sleep((ran_s - before_s) * (1 / share - 1))
            os.kill(worker, signal.SIGCONT)
            time.sleep(_TURN_S)
        else:
            time.sleep(2 * _TURN_S)


def _ran_s(process: int) -> float:
    """Seconds that a process has had of a processor, where the system tells."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _end_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
