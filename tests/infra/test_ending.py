"""What a bench started does not outlive it, however it is told to end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from tests.support import eventually

ROOT = Path(__file__).resolve().parents[2]


def test_a_bench_that_is_told_to_end_stops_its_servers() -> None:
    command = [sys.executable, "-m", "infra.cli", "bench", "memory", "--users", "100000000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        bench = psutil.Process(process.pid)
        servers = eventually(lambda: [one for one in bench.children() if "redis" in one.name()], 60)
        process.terminate()
        assert process.wait(60) == 128 + 15
    gone, left = psutil.wait_procs(servers, timeout=10)
    assert gone and not left
