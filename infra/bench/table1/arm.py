"""One graph in a process of its own, which answers and takes the time when it is told to.

Without torch, so that what the process takes is the runtime's and the model's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from infra.bench.engine_arm import memory

Feed = dict[str, npt.NDArray[Any]]
Run = Callable[[Feed], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Arm:
    """A graph in a file, which ONNX Runtime runs, and inputs for it. `workers` answer at the same time when
    throughput is taken; each request has `threads`."""

    method: str
    form: str
    path: Path
    feeds: tuple[Feed, ...]
    threads: int = 1
    workers: int = 1


def serve(arm: Arm, pipe: Connection) -> None:
    """Say what the first inputs give and what memory that took; then take times until the pipe says None."""
    import onnxruntime  # noqa: F401 - before memory is looked at: what the library takes is not the model's

    before = memory()["memory_mib"]
    run = _loaded(arm)
    scores = [run(feed) for feed in arm.feeds]
    taken = memory()
    pipe.send(
        {"scores": scores, "memory_mib": taken["memory_mib"] - before, "peak_mib": taken["peak_mib"] - before}
    )
    with ThreadPoolExecutor(arm.workers) as pool:
        while (asked := pipe.recv()) is not None:
            what, seconds = asked
            if what == "latency":
                pipe.send(_latencies(run, arm.feeds, seconds))
            else:
                all_at_once = [pool.submit(_latencies, run, arm.feeds, seconds) for _ in range(arm.workers)]
                took = [one.result() for one in all_at_once]
                pipe.send(sum(len(one) / sum(one) for one in took))


def _latencies(run: Run, feeds: tuple[Feed, ...], seconds: float) -> list[float]:
    """Seconds of each request, one after another, for so long and at least three."""
    took: list[float] = []
    end = time.perf_counter() + seconds
    while len(took) < 3 or time.perf_counter() < end:
        feed = feeds[len(took) % len(feeds)]
        started = time.perf_counter()
        run(feed)
        took.append(time.perf_counter() - started)
    return took


def _loaded(arm: Arm) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = arm.threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(arm.path), options, providers=["CPUExecutionProvider"])

    def run(feed: Feed) -> npt.NDArray[np.float32]:
        return np.asarray(session.run(["scores"], feed)[0], np.float32)

    return run
