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
    command: Sequence[str]
    process: subprocess.Popen[bytes]
    started_s: float
    told: bool = False


def supervise(commands: Sequence[Sequence[str]]) -> int:
    """A process for each command; one that dies is started again, at most once a second.

    Returns when SIGTERM or SIGINT has been passed on and all have ended, with the worst exit code. A child
    is told once: a second signal would end one that has drained and is about to go.
    """
    stopping = False

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        for child in children:
            if not child.told and child.process.poll() is None:
                child.told = True
                child.process.send_signal(signal.SIGTERM)

    children = [_start(command) for command in commands]
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while not stopping:
        for position, child in enumerate(children):
            code = child.process.poll()
            if code is not None and not stopping:
                log.warning("Process %d ended with %d and is started again", position, code)
                time.sleep(max(0.0, RESTART_AFTER_S - (time.monotonic() - child.started_s)))
                if not stopping:
                    children[position] = _start(child.command)
        time.sleep(0.2)
    # Again: a child that was being started when the signal came has not had it.
    stop(signal.SIGTERM, None)
    return max(abs(child.process.wait()) for child in children)


def _start(command: Sequence[str]) -> _Child:
    return _Child(command, subprocess.Popen(list(command)), time.monotonic())
