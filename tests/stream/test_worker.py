"""How a worker process ends, and what its supervisor does about it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from stream.hard_stop import EXIT_CODE, HardStop
from tests.support import eventually

ROOT = Path(__file__).resolve().parents[2]


def test_a_process_that_cannot_end_is_ended_and_says_what_it_leaves():
    code = """
import logging, threading
from stream.hard_stop import HardStop
logging.basicConfig()
threading.Thread(target=threading.Event().wait, name="stuck-in-a-library").start()
HardStop(0.1, lambda: "3 records in hand").arm()
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert ended.returncode == EXIT_CODE == 75
    assert "3 records in hand" in ended.stderr
    assert "stuck-in-a-library" in ended.stderr


def test_a_log_that_hangs_does_not_hold_up_the_end():
    left = threading.Event()
    ended: list[int] = []

    def hang() -> str:
        left.wait(20)
        return ""

    HardStop(0.0, hang, ended.append).arm()
    eventually(lambda: ended == [EXIT_CODE], 5.0)
    left.set()


@pytest.fixture
def silent_broker():
    """Takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        yield server


def test_sigterm_ends_a_worker_whose_broker_is_silent(silent_broker, tmp_path):
    """Nothing is begun before the broker has said that the topics are there."""
    address = f"127.0.0.1:{silent_broker.getsockname()[1]}"
    command = [sys.executable, "-m", "infra.cli", "worker", "--bootstrap", address, "--http-port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE) as process:
        connections = []

        def connected() -> bool:
            with contextlib.suppress(TimeoutError):
                connections.append(silent_broker.accept())
            # The first only asks whether anybody listens.
            return len(connections) > 1

        eventually(connected, 30.0)
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(5) == -signal.SIGTERM
        finally:
            process.kill()
            for connection, _ in connections:
                connection.close()


def test_sigterm_ends_a_worker_whose_broker_has_gone_silent_since(parts, kafka, start_worker):
    running = start_worker(environment={"STREAM_DRAIN_TIMEOUT_MS": "1000", "STREAM_CLOSE_TIMEOUT_MS": "4000"})
    process = psutil.Process(running.pid)
    kafka.pause()
    try:
        process.send_signal(signal.SIGTERM)
        eventually(lambda: running.pid is None, 15.0)
    finally:
        kafka.resume()
