"""Several processes beside each other, for as long as this one lives."""

from __future__ import annotations

import logging
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Final

log = logging.getLogger(__name__)

RESTART_AFTER_S: Final = 1.0


@dataclass(slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    started_s: float
    told: bool = False


class Beside:
    """How processes are started, and what is done between looks at them."""

    def start(self, position: int, command: Sequence[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(list(command))

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        """The processes are told to end."""


def supervise(commands: Sequence[Sequence[str]], beside: Beside | None = None) -> int:
    """A process for each command; one that dies is started again, at most once a second.

    Returns when SIGTERM or SIGINT has been passed on and all have ended, with the worst exit code. A child
    is told once: a second signal would end one that has drained and is about to go.
    """
    beside = beside or Beside()
    stopping = False

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        for child in children:
            if not child.told and child.process.poll() is None:
                child.told = True
                child.process.send_signal(signal.SIGTERM)

    def start(position: int) -> _Child:
        return _Child(beside.start(position, commands[position]), time.monotonic())

    children = [start(position) for position in range(len(commands))]
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while not stopping:
        for position, child in enumerate(children):
            code = child.process.poll()
            if code is not None and not stopping:
                log.warning("Process %d ended with %d and is started again", position, code)
                beside.wait(max(0.0, RESTART_AFTER_S - (time.monotonic() - child.started_s)))
                if not stopping:
                    children[position] = start(position)
        beside.wait(0.2)
    beside.close()
    # Again: a child that was being started when the signal came has not had it.
    stop(signal.SIGTERM, None)
    return max(abs(child.process.wait()) for child in children)
