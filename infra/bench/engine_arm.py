"""One engine in a process of its own, which loads, answers and takes the time when it is told to."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil

from compression.releases.registry import Registry
from inference import engines
from inference.engines.base import INPUTS, Engine, EngineOptions, Shape, inputs_of
from inference.errors import InferenceError
from inference.types import Graph, Tensors

GRAPHS: Final[tuple[Graph, ...]] = ("encode", "score")
CANDIDATES: Final = 50
_MIB: Final = 2**20


@dataclass(frozen=True, slots=True)
class Arm:
    """An engine with its options, by the name of its row."""

    engine: str
    options: EngineOptions

    @property
    def place(self) -> str:
        return self.options.provider if self.engine == "onnx" else self.options.device


def serve(arm: Arm, registry: Path, batches: Mapping[int, list[Tensors]], pipe: Connection) -> None:
    """Say "ready" with memory and answers, or why not; then time what the pipe asks for, until it ends."""
    try:
        engine = engines.create(arm.engine, arm.options)
        started = time.perf_counter()
        engine.load(Registry(registry).open(), GRAPHS)
        engine.warm_up(_shapes(batches))
        answers = {size: _lists(engine, given[0]) for size, given in batches.items()}
    except InferenceError as error:
        pipe.send({"refused": str(error)})
        return
    pipe.send({"answers": answers, "start_s": time.perf_counter() - started})
    while (asked := pipe.recv()) is not None:
        size, seconds = asked
        pipe.send(_timed(engine, batches[size], seconds))
    pipe.send(memory())
    engine.close()


def _lists(engine: Engine, given: Tensors) -> Tensors:
    """Encode, then score the candidates, as a list is made; both answers."""
    states = engine.run("encode", {name: given[name] for name in INPUTS["encode"]})
    asked = {**given, **states}
    scores = engine.run("score", {name: asked[name] for name in inputs_of("score", engine.model)})
    return {"user_vector": states["user_vector"], **scores}


def _timed(engine: Engine, batches: list[Tensors], seconds: float) -> list[float]:
    """Seconds of each batch, in turn, for so long and at least five."""
    took: list[float] = []
    end = time.perf_counter() + seconds
    while len(took) < 5 or time.perf_counter() < end:
        given = batches[len(took) % len(batches)]
        started = time.perf_counter()
        _lists(engine, given)
        took.append(time.perf_counter() - started)
    return took


def _shapes(batches: Mapping[int, list[Tensors]]) -> list[Shape]:
    histories = {(size, given["items"].shape[1]) for size, some in batches.items() for given in some}
    return [
        Shape(graph, size, history, CANDIDATES if graph == "score" else 0)
        for size, history in sorted(histories)
        for graph in GRAPHS
    ]


def memory() -> dict[str, float]:
    """MiB of this process: now, and the most it ever had."""
    now = psutil.Process().memory_info().rss / _MIB
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage counts what the parent had when it forked
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return {"memory_mib": now, "peak_mib": int(line.split()[1]) / 1024}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"memory_mib": now, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB}


def width(lengths: Any, histories: tuple[int, ...]) -> int:
    """The smallest bucket that holds every history of a batch."""
    return next((size for size in histories if size >= int(np.max(lengths, initial=0))), histories[-1])
