"""An arm that is up, answers as the model does, and has a load process of its own."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import psutil

from compression.registry import Artefact, Registry
from inference.engines.base import TOLERANCE
from infra.bench.serve import payload
from infra.bench.serve.arms import Arm, Served
from infra.bench.serve.load import Address, first_scores
from infra.bench.serve.search import Step
from infra.local.server import HOST, ServerFailed, free_port
from infra.local.worker import spawn

START_S: Final = 90.0


class ArmFailed(RuntimeError):
    """An arm that does not start, or does not answer as the model does; the message says which."""


class Running:
    """Takes one step at a time. `server` is None for the arm that has none."""

    def __init__(self, load: subprocess.Popen[str], server: psutil.Process | None, lists: int) -> None:
        self._load = load
        self._server = server
        self._lists = lists

    def step(self, lists_per_s: float, *, seconds: float, seed: int) -> Step:
        """Offer a rate for some seconds and say what came of it."""
        assert self._load.stdin is not None
        assert self._load.stdout is not None
        before_s = self._server_cpu_s()
        self._load.stdin.write(
            json.dumps({"lists_per_s": lists_per_s, "seconds": seconds, "seed": seed}) + "\n"
        )
        self._load.stdin.flush()
        line = self._load.stdout.readline()
        if not line:
            raise ArmFailed("the load process ended")
        step = Step(**json.loads(line))
        answered = max(1, (step.requests - step.failed) * self._lists)
        return step.with_server_cpu_us((self._server_cpu_s() - before_s) * 1e6 / answered)

    def _server_cpu_s(self) -> float:
        return sum(_cpu_s(process) for process in _tree(self._server)) if self._server else 0.0


@contextmanager
def running(arm: Arm, registry: Path, *, lists: int, workers: int) -> Iterator[Running]:
    """Start, compare the first answer, hand over, stop everything. Raises `ArmFailed`."""
    folder = Path(tempfile.mkdtemp(prefix=f"tailrace-serve-{arm.name}-"))
    artefact = Registry(registry).open()
    served = Served(
        registry=registry,
        artefact=artefact,
        lists=lists,
        workers=workers,
        port=free_port(),
        folder=folder,
    )
    try:
        server = arm.start(served)
    except ServerFailed as error:
        raise ArmFailed(str(error)) from error
    load = None
    try:
        if server is None:
            arguments = ["infra.bench.serve.in_process", str(registry), str(workers), str(lists)]
        else:
            address = Address(arm.wire, HOST, served.port, arm.target(served))
            _wait(server, address, artefact, lists, folder, TOLERANCE[arm.precision])
            arguments = [
                "infra.bench.serve.load",
                *(address.wire, address.host, str(address.port), address.target),
                *map(str, (lists, *payload.Known.of(artefact.vocabulary()))),
            ]
        load = spawn(*arguments, folder=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        yield Running(load, psutil.Process(server.pid) if server else None, lists)
    finally:
        if load is not None:
            _stop(load)
        if server is not None:
            _stop(server)
        shutil.rmtree(folder, ignore_errors=True)


def expected_scores(artefact: Artefact, lists: int) -> payload.Float32:
    """What the first request's answer should be, from ONNX Runtime itself."""
    from inference import engines

    engine = engines.create("onnx")
    engine.load(artefact, ("rank",))
    rows = payload.requests(payload.Known.of(artefact.vocabulary()), lists)[0]
    scores: payload.Float32 = engine.run("rank", payload.tensors(rows))["scores"]
    engine.close()
    return scores


def _wait(
    server: subprocess.Popen[bytes],
    address: Address,
    artefact: Artefact,
    lists: int,
    folder: Path,
    tolerance: float,
) -> None:
    """Until the first request is answered, rightly."""
    expected = expected_scores(artefact, lists)
    known = payload.Known.of(artefact.vocabulary())
    deadline_s = time.monotonic() + START_S
    while True:
        scores = asyncio.run(first_scores(address, known, lists))
        if scores is not None:
            break
        if server.poll() is not None:
            raise ArmFailed(f"ended with {server.returncode}{_tail(folder)}")
        if time.monotonic() > deadline_s:
            raise ArmFailed(f"no answer in {START_S:.0f} s{_tail(folder)}")
        time.sleep(0.2)
    if scores.shape != expected.shape or np.abs(scores - expected).max() > tolerance:
        raise ArmFailed("answers with other scores than the model's")


def _tail(folder: Path, lines: int = 8) -> str:
    said = [line for log in folder.rglob("*.log") for line in log.read_text(errors="replace").splitlines()]
    return "".join(f"\n  {line}" for line in said[-lines:])


def _tree(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def _stop(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """SIGTERM to the process, then SIGKILL to whatever is left of it and its children."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    family: list[psutil.Process] = []
    if process.poll() is None:
        family = _tree(psutil.Process(process.pid))
        process.terminate()
    _, left = psutil.wait_procs(family, timeout=10)
    for one in left:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
