"""The contract every engine keeps, and the shapes it is warmed with.

An engine computes graphs and nothing else: it knows no users, no items, no batches in time. It is
called by one thread at a time, and only with shapes it has been warmed for.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal, NamedTuple, Self

import numpy as np

from compression.releases.registry import Artefact, ModelShape
from inference.errors import ModelUnavailable
from inference.types import Graph, Tensors

Precision = Literal["f32", "bf16", "f16", "int8"]

WEIGHTS: Final = "weights.safetensors"
GRAPHS: Final[tuple[Graph, ...]] = ("encode", "score", "rank")
_HISTORY: Final = ("items", "categories", "behaviors", "gaps", "lengths")
_CANDIDATES: Final = ("candidates", "candidate_categories")
# Of any model; the states of one that has some come with "score" and "append" (`inputs_of`).
INPUTS: Final[dict[Graph, tuple[str, ...]]] = {
    "encode": _HISTORY,
    "score": ("lengths", "user_vector", *_CANDIDATES),
    "rank": (*_HISTORY, *_CANDIDATES),
    "append": _HISTORY,
}
_OUTPUTS: Final[dict[Graph, tuple[str, ...]]] = {
    "encode": ("user_vector",),
    "score": ("scores",),
    "rank": ("scores", "user_vector"),
    "append": ("user_vector",),
}
# Largest difference from torch in f32 of any output, per precision. Scores and vectors are of order 1;
# a reordered f32 sum moves the last digits, bf16 keeps 8 bits of mantissa through every layer and f16 11,
# int8 rounds weights to 127 steps. About twice the worst that trained and random models showed (LOG.md).
TOLERANCE: Final[dict[Precision, float]] = {"f32": 1e-4, "bf16": 1e-1, "f16": 2e-2, "int8": 0.25}


class Shape(NamedTuple):
    """One shape an engine is warmed with; `candidates` is 0 for "encode" and "append"."""

    graph: Graph
    batch: int
    history: int
    candidates: int


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine may be told. `provider` is ONNX Runtime's word, `device` OpenVINO's and torch's.

    `plans` is the folder of TensorRT's built engines; empty is one in the user's cache folder.
    `url` and what follows are for the remote engine. `url` is host:port, or grpcs://host:port for TLS;
    `model` and `model_version` are what a graph is called there and may hold {graph} and {version}, an
    empty version leaves the choice to the server; and an answer takes `timeout_ms` at most.
    """

    threads: int = 1
    precision: Precision = "f32"
    provider: str = "CPUExecutionProvider"
    device: str = "CPU"
    plans: str = ""
    url: str = ""
    model: str = "tailrace-{graph}"
    model_version: str = "{version}"
    timeout_ms: float = 1_000.0


def inputs_of(graph: Graph, model: ModelShape) -> tuple[str, ...]:
    """What a graph of this model reads. Some models score a candidate by the user vector alone;
    histories come with all their columns whatever a network reads of them, so that who asks need not know."""
    if graph == "score" and model.scores_by_vector:
        return ("user_vector", "candidates")
    return (*(model.state_names if graph in ("score", "append") else ()), *INPUTS[graph])


def outputs_of(graph: Graph, model: ModelShape) -> tuple[str, ...]:
    """What a graph of this model answers with."""
    states = {"encode": model.state_names, "append": model.new_state_names}
    return (*_OUTPUTS[graph], *states.get(graph, ()))


def graphs_of(engine: Engine, *, cached: bool, artefact: Artefact) -> tuple[Graph, ...]:
    """The graphs that an engine is asked to run for lists. Where histories are `cached` one for appended
    events, else one for known candidates together with their history; where the version has it."""
    if not engine.keeps_states and not artefact.manifest.model.scores_by_vector:
        return ("encode", "rank")
    third: Graph = "append" if cached and engine.keeps_states else "rank"
    return (*GRAPHS[:2], third) if third in artefact.manifest.graphs else GRAPHS[:2]


class Engine(ABC):
    """load → warm_up → run (many times) → close.

    `run` takes and returns C-contiguous arrays named as in the exported graphs; the arrays it returns
    belong to the caller. It raises `EngineFailed` and nothing else.
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[Precision, ...]] = ("f32",)
    keeps_states: ClassVar[bool] = True  # False: states are too heavy to bring here
    # False: a shape's first run costs hardly more than its others, so one engine's runs of all of them do
    # for its like (LOG.md).
    compiles_shapes: bool = True
    model: ModelShape

    def __init__(self, options: EngineOptions) -> None:
        if options.precision not in self.precisions:
            raise ModelUnavailable(
                f"the {self.name} engine computes in {' or '.join(self.precisions)}, not {options.precision}"
            )
        self.options = options

    @property
    def precision(self) -> Precision:
        return self.options.precision

    @abstractmethod
    def load(self, artefact: Artefact, graphs: Sequence[Graph] = GRAPHS) -> None:
        """Build graphs from verified bytes. Raises `ModelUnavailable` with the reason."""

    def prepare(self, artefact: Artefact, graphs: Sequence[Graph], folder: Path) -> None:
        """Write what `load_prepared` reads into an empty folder: the part of loading that takes long and
        can be done in another process of this machine. Only engines that `inference.engines.prepares`."""
        raise NotImplementedError

    def load_prepared(self, model: ModelShape, graphs: Sequence[Graph], folder: Path) -> None:
        """Instead of `load`, in milliseconds, from a folder that is known to hold what `prepare` wrote; some
        graphs after others if need be. Its files may stay mapped. Raises `ModelUnavailable` with the
        reason."""
        raise NotImplementedError

    def beside(self) -> Self | None:
        """An engine for one more thread, as warm as this one, that shares all that runs do not write to.
        None where the library has no such thing."""
        return None

    @abstractmethod
    def run(self, graph: Graph, inputs: Tensors) -> Tensors: ...

    def run_for(self, graph: Graph, inputs: Tensors, outputs: Sequence[str]) -> Tensors:
        """`run`, for who needs some of the outputs; a remote engine fetches no others."""
        answers = self.run(graph, inputs)
        return {name: answers[name] for name in outputs}

    @abstractmethod
    def close(self) -> None:
        """Free the model; safe to call twice."""

    def warm_up(self, shapes: Iterable[Shape], *, repeats: int = 3) -> dict[Shape, float]:
        """Run every shape, and say how long the fastest repeat took, in seconds."""
        cost_s: dict[Shape, float] = {}
        for shape in shapes:
            inputs = self.example(shape)
            for _ in range(max(1, repeats)):
                started = time.perf_counter()
                self.run(shape.graph, inputs)
                took = time.perf_counter() - started
                cost_s[shape] = min(took, cost_s.get(shape, took))
        return cost_s

    def example(self, shape: Shape) -> Tensors:
        """Inputs of one shape: full-length histories of padding rows, with room for one to append."""
        model, batch, history = self.model, shape.batch, shape.history
        appends = shape.graph == "append"
        lengths = np.full(batch, history - appends, np.int32)
        inputs: Tensors = {}
        if shape.graph != "score":
            for column in ("items", "categories", "behaviors", "gaps"):
                inputs[column] = np.zeros((batch, 1 if appends else history), np.int32)
        for name in model.state_names:
            inputs[name] = np.zeros((batch, history, model.dim), np.float32)
        if shape.graph == "score":
            inputs["user_vector"] = np.zeros((batch, model.dim), np.float32)
        inputs["lengths"] = lengths
        if shape.graph in ("score", "rank"):
            inputs["candidates"] = np.zeros((batch, shape.candidates), np.int32)
            inputs["candidate_categories"] = np.zeros((batch, shape.candidates), np.int32)
        return {name: inputs[name] for name in inputs_of(shape.graph, model)}
