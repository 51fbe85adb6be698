"""Running a worker process."""

from __future__ import annotations

import gc
import signal
import sys

import uvloop

from features.settings import FeatureSettings
from inference.admission.settings import AdmissionSettings
from inference.settings import InferenceSettings
from stream.hard_stop import HardStop
from stream.settings import StreamSettings


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
