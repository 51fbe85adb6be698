"""Retraining on a schedule: when, one at a time, through crashes, and to a clean end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import redis

from compression.retraining.runs import Run
from features import keys
from infra.local.server import LocalServer
from infra.retraining.job import job
from infra.retraining.schedule import Cron, ScheduleInvalid, Service
from tests.compression.small_retraining import RECIPE, short_log
from tests.support import eventually, eventually_async

ROOT = Path(__file__).resolve().parents[2]


def test_times_are_those_of_the_expression_in_utc():
    nine = 1_511_600_400.0  # 2017-11-25 09:00
    assert Cron("0 * * * *").next_s(nine) == nine + 3600
    assert Cron("*/15 * * * *").next_s(nine + 1) == nine + 900
    assert Cron("30 3 * * *").next_s(nine) == 1_511_667_000.0
    for wrong in ("often", "* * * *", "61 * * * *", "* * * * * *"):
        with pytest.raises(ScheduleInvalid):
            Cron(wrong)


class Often(Cron):
    """Every few hundredths of a second, which no expression can say."""

    def __init__(self) -> None:
        super().__init__("* * * * *")

    def next_s(self, after_s: float) -> float:
        return after_s + 0.02


# A run that notes its name and ends as the file beside the notes says: one code per run.
CHILD = """
import os, signal, sys
from pathlib import Path
folder = Path(sys.argv[1])
with (folder / "notes").open("a") as notes:
    notes.write(sys.argv[-1] + "\\n")
codes = (folder / "codes").read_text().split()
code = int(codes[0]) if codes else 0
(folder / "codes").write_text(" ".join(codes[1:]))
os.kill(os.getpid(), signal.SIGKILL) if code < 0 else sys.exit(code)
"""


async def test_every_run_has_a_name_of_its_own_and_a_killed_one_keeps_it(tmp_path):
    (tmp_path / "codes").write_text("0 -9 0 3 4")
    service = Service(Often(), [sys.executable, "-c", CHILD, str(tmp_path)], tmp_path, "serving")
    work = asyncio.create_task(service.run("127.0.0.1", 0))

    await eventually_async(lambda: service.ended("held") >= 1, 30)
    assert service.ended("refused") == 1
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(work, 30) == 0
    notes = (tmp_path / "notes").read_text().split()
    assert notes[1] == notes[2]
    assert len({*notes[:6]}) == len(notes[:6]) - 1


class Retraining(LocalServer):
    """`tailrace retrain --schedule`, ready when /healthz says so."""

    name = "retraining"

    def __init__(self, folder: Path, log: Path, redis_url: str) -> None:
        super().__init__(folder)
        self._told = ["--log", str(log), "--registry", str(folder / "models"), "--runs", str(folder / "runs")]
        self._told += ["--redis-url", redis_url, "--bootstrap", "127.0.0.1:9", "--schedule", "0 0 1 1 *"]
        self._told += ["--lease-seconds", "1"]

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "infra.cli", "retrain", *self._told, "--http-port", str(self.port)]
        return ["env", f"PYTHONPATH={ROOT}", *command]

    def _answers(self) -> bool:
        try:
            return bool(self.health()["healthy"])
        except OSError:
            return False

    def health(self) -> dict[str, object]:
        with urllib.request.urlopen(f"http://{self.address}/healthz", timeout=5) as response:
            return json.load(response)

    def child(self) -> psutil.Process | None:
        found = psutil.Process(self.pid).children()
        return found[0] if found else None


@pytest.fixture
def left(tmp_path):
    """A run that somebody began and nobody ended; it would take an hour."""
    log = short_log(tmp_path / "clicks.csv")
    asked = job(
        log=log,
        bounds=None,
        registry=tmp_path / "models",
        alias="serving",
        recipe=replace(RECIPE, epochs=10_000, patience=10_000, max_minutes=60.0),
        split="leave-one-out",
        seed=1,
        max_events=10**6,
        from_serving=False,
    )
    return Run.begin(tmp_path / "runs", "left", asked.model_dump(mode="json"))


def test_a_run_that_was_left_goes_on_survives_a_kill_and_is_kept_at_sigterm(left, redis_url, tmp_path):
    def training(attempt: int) -> bool:
        state = Run.find(tmp_path / "runs", "left").state
        progress = left.folder / "progress.json"
        told = progress.read_bytes() if progress.is_file() else b""
        return state.attempts == attempt and b'"train"' in told and b"epoch" in told

    with Retraining(tmp_path, tmp_path / "clicks.csv", redis_url) as service:
        eventually(lambda: training(1), 60, what="the run that was left")
        assert service.health()["running"]["run"] == "left"
        first = service.child()
        first.kill()
        first.wait(30)
        (left.folder / "progress.json").unlink()
        eventually(lambda: training(2), 60, what="the run that was killed")
        second = service.child()
        assert second.pid != first.pid
        service.stop(timeout_s=60)
        assert not second.is_running()
    state = Run.find(tmp_path / "runs", "left").state
    assert state.outcome == "running"
    assert (left.folder / "checkpoint.safetensors").is_file()
    with redis.Redis.from_url(redis_url) as client:
        assert not client.exists(keys.retraining_lease("serving"))
