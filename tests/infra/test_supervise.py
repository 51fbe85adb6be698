"""Processes beside each other: one that dies comes back, and all end together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIRST_ENDS = """
import pathlib, sys, time
mark = pathlib.Path(sys.argv[1])
if mark.exists():
    time.sleep(3600)
mark.touch()
"""
SUPERVISOR = f"""
import logging, sys
from infra.supervise import supervise
logging.basicConfig(level="INFO")
sys.exit(supervise([[sys.executable, "-c", {FIRST_ENDS!r}, sys.argv[1]]]))
"""

DRAINS = """
import signal, sys, time
def drain(number, frame):
    signal.signal(number, signal.SIG_DFL)  # as an event loop leaves it that is closed
    time.sleep(1.0)
    sys.exit(0)
signal.signal(signal.SIGTERM, drain)
print("ready", flush=True)
time.sleep(3600)
"""


def test_a_process_that_drains_is_told_once(tmp_path: Path) -> None:
    script = f"""
import sys
from infra.supervise import supervise
sys.exit(supervise([[sys.executable, "-c", {DRAINS!r}]]))
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_a_process_that_is_started_again_when_the_signal_comes_ends_too(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SUPERVISOR, str(tmp_path / "has-run")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stderr
            for told in process.stderr:
                if b"is started again" in told:
                    break
            process.send_signal(signal.SIGTERM)
            process.wait(10)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
