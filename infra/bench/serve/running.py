"""An arm that is up, answers as the model does, and has load processes of its own."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import psutil

from compression.releases.registry import Artefact, Registry
from inference.engines.base import TOLERANCE
from infra.bench.serve.arms import Arm, Served
from infra.bench.serve.load import Address, first_scores
from infra.bench.serve.parity import COMPARED, difference, expected_scores
from infra.bench.serve.search import Step
from infra.bench.serve.sessions import Sessions
from infra.local.server import HOST, ServerFailed, free_port
from infra.local.worker import spawn

START_S: Final = 90.0
_SETTLES_S: Final = 0.2


class ArmFailed(RuntimeError):
    """An arm that does not start, or does not answer as the model does; the message says which."""


class Running:
    """Takes one step at a time. `server` is None for an arm that has none; `difference` is how far the first
    answers' scores lay from the model's at most."""

    def __init__(
        self,
        loads: Sequence[subprocess.Popen[str]],
        server: psutil.Process | None,
        lists: int,
        difference: float,
    ) -> None:
        self.difference = difference
        self._loads = loads
        self._server = server
        self._lists = lists

    def pause(self) -> None:
        """Take nothing of the machine for a while: some servers do although nobody asks them anything."""
        _tell(self._server, signal.SIGSTOP)

    def resume(self) -> None:
        """What was due meanwhile happens before a step begins."""
        _tell(self._server, signal.SIGCONT)
        time.sleep(_SETTLES_S)

    def step(self, lists_per_s: float, *, seconds: float, seed: int) -> Step:
        """Offer a rate for some seconds and say what came of it."""
        before_s = self._server_cpu_s()
        told = {"lists_per_s": lists_per_s, "seconds": seconds, "seed": seed, "parts": len(self._loads)}
        for part, load in enumerate(self._loads):
            assert load.stdin is not None
            load.stdin.write(json.dumps({**told, "part": part}) + "\n")
            load.stdin.flush()
        lines = [load.stdout.readline() for load in self._loads if load.stdout is not None]
        if not all(lines):
            raise ArmFailed("a load process ended")
        step = Step.together([Step(**json.loads(line)) for line in lines])
        answered = max(1, (step.requests - step.failed) * self._lists)
        return step.with_server_cpu_us((self._server_cpu_s() - before_s) * 1e6 / answered)

    def _server_cpu_s(self) -> float:
        return sum(_cpu_s(process) for process in _tree(self._server)) if self._server else 0.0


@contextmanager
def running(arm: Arm, registry: Path, sessions: Path, *, lists: int, workers: int) -> Iterator[Running]:
    """Start, compare the first answers, hand over, stop everything. Raises `ArmFailed`. `sessions` is a file
    (`Sessions.save`)."""
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
    loads: list[subprocess.Popen[str]] = []
    found = 0.0
    try:
        if server is None:
            about = [str(registry), str(sessions), str(lists), str(arm.cache_mb)]
            started = [
                ["infra.bench.serve.in_process", *about, str(part), str(workers)] for part in range(workers)
            ]
        else:
            address = Address(arm.wire, HOST, served.port, arm.target(served), arm.padding)
            found = _wait(server, address, artefact, sessions, lists, folder)
            arguments = [
                "infra.bench.serve.load",
                *(address.wire, address.host, str(address.port), address.target, address.padding),
                *(str(sessions), str(lists)),
            ]
            started = [arguments]
        for arguments in started:
            loads.append(
                spawn(*arguments, folder=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
        if server is None:
            found = max(_said(load, folder) for load in loads)
        if not found <= TOLERANCE[arm.precision]:
            raise ArmFailed(f"answers with other scores than the model's: {found:.2g} apart")
        yield Running(loads, psutil.Process(server.pid) if server else None, lists, found)
    finally:
        for load in loads:
            _stop(load)
        if server is not None:
            _stop(server)
        shutil.rmtree(folder, ignore_errors=True)


def _said(load: subprocess.Popen[str], folder: Path) -> float:
    """What a load process that is the arm itself says of its scores."""
    assert load.stdout is not None
    line = load.stdout.readline()
    if not line:
        raise ArmFailed(f"ended{_tail(folder)}")
    return float(json.loads(line)["difference"])


def _wait(
    server: subprocess.Popen[bytes],
    address: Address,
    artefact: Artefact,
    sessions: Path,
    lists: int,
    folder: Path,
) -> float:
    """Until the first requests are answered; how far from rightly."""
    requests = Sessions.load(sessions).requests(lists)[:COMPARED]
    expected = expected_scores(artefact, requests)
    deadline_s = time.monotonic() + START_S
    while (answers := asyncio.run(first_scores(address, requests))) is None:
        if server.poll() is not None:
            raise ArmFailed(f"ended with {server.returncode}{_tail(folder)}")
        if time.monotonic() > deadline_s:
            raise ArmFailed(f"no answer in {START_S:.0f} s{_tail(folder)}")
        time.sleep(0.2)
    return difference(answers, expected)


def _tail(folder: Path, lines: int = 8) -> str:
    said = [line for log in folder.rglob("*.log") for line in log.read_text(errors="replace").splitlines()]
    return "".join(f"\n  {line}" for line in said[-lines:])


def _tree(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _tell(server: psutil.Process | None, number: signal.Signals) -> None:
    """A server, if there is one, and its children."""
    for process in _tree(server) if server else ():
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


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
        _tell(family[0] if family else None, signal.SIGCONT)  # who is paused does not end
    _, left = psutil.wait_procs(family, timeout=10)
    for one in left:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
