"""Running a worker process, or several beside each other."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from types import FrameType

import uvloop

from features.settings import FeatureSettings
from inference.admission.settings import AdmissionSettings
from inference.settings import InferenceSettings
from stream.hard_stop import HardStop
from stream.settings import StreamSettings

log = logging.getLogger(__name__)

RESTART_AFTER_S = 1.0


def run(
    stream: StreamSettings,
    features: FeatureSettings,
    inference: InferenceSettings,
    admission: AdmissionSettings,
    *,
    log_level: str = "INFO",
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Does not return: the process exits with 0, with an
    error if the worker crashed, or with `hard_stop.EXIT_CODE` if drain and close took longer than
    `drain_timeout_ms` + `close_timeout_ms`."""
    import faust

    from stream.app import create_app

    _tune()
    loop = uvloop.new_event_loop()
    app = create_app(stream, features, inference, admission)
    hard_stop = HardStop((stream.drain_timeout_ms + stream.close_timeout_ms) / 1000, app.resources.left)

    class Worker(faust.Worker):  # type: ignore[misc]  # faust has no types
        """Faust's, with the hard stop armed however the end begins."""

        def _schedule_shutdown(self, signal: signal.Signals) -> None:
            hard_stop.arm()
            super()._schedule_shutdown(signal)

        def on_worker_shutdown(self) -> None:
            hard_stop.arm()
            super().on_worker_shutdown()

    worker = Worker(
        app,
        loop=loop,
        loglevel=log_level,
        redirect_stdouts=False,
        quiet=True,
        blocking_timeout=0.0,
        override_logging=False,
    )
    worker.execute_from_commandline()


def _tune() -> None:
    """Settings of the interpreter for a loop thread beside a ranking thread.

    A full collection of a worker's heap (a model's vocabulary, torch-free libraries, cached lists)
    stops both threads for tens of milliseconds and finds nothing: what lives long is frozen once the
    model is loaded (`stream.resources`), and the rest is looked at less often. The ranking thread
    calls many short numpy functions; it gets the interpreter back within half a millisecond of
    asking, not five.
    """
    gc.set_threshold(20_000, 50, 100)
    sys.setswitchinterval(0.0005)


@dataclass(slots=True)
class _Child:
    arguments: list[str]
    process: subprocess.Popen[bytes]
    started_s: float


def supervise(count: int, arguments: list[str], instance_id: str, http_port: int) -> int:
    """`count` worker processes `<instance_id>-0…`, probes on ports from `http_port`; one that dies is
    started again. Returns when SIGTERM or SIGINT has been passed on and all have drained."""
    stopping = False

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        for child in children:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)

    children = [
        _start(
            [
                *arguments,
                "--instance-id",
                f"{instance_id}-{number}",
                "--http-port",
                str(http_port + number if http_port else 0),
            ]
        )
        for number in range(count)
    ]
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while not stopping:
        for position, child in enumerate(children):
            code = child.process.poll()
            if code is not None and not stopping:
                log.warning("Worker process %d ended with %d and is started again", position, code)
                time.sleep(max(0.0, RESTART_AFTER_S - (time.monotonic() - child.started_s)))
                if not stopping:
                    children[position] = _start(child.arguments)
        time.sleep(0.2)
    # Again: a child that was being started when the signal came has not had it.
    stop(signal.SIGTERM, None)
    return max(abs(child.process.wait()) for child in children)


def _start(arguments: list[str]) -> _Child:
    command = [sys.executable, "-m", "infra.cli", "worker", *arguments]
    return _Child(arguments, subprocess.Popen(command, env=os.environ.copy()), time.monotonic())
