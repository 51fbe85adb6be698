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
