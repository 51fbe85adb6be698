"""What a bench started does not outlive it, however it is told to end."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


def test_a_bench_that_is_told_to_end_stops_its_servers() -> None:
    command = [sys.executable, "-m", "infra.cli", "bench", "memory", "--users", "100000000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        bench, deadline_s = psutil.Process(process.pid), time.monotonic() + 60
        while not (servers := [one for one in bench.children() if "redis" in one.name()]):
            assert process.poll() is None and time.monotonic() < deadline_s
            time.sleep(0.05)
        process.terminate()
        assert process.wait(60) == 128 + 15
    gone, left = psutil.wait_procs(servers, timeout=10)
    assert gone and not left
