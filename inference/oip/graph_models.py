"""The graphs of a released version as models: `tailrace-encode`, `tailrace-score`, `tailrace-rank`.

Requests for one graph that fit the same warmed shape go through the engine together, whoever sent them.
For `rank`, whose answers have no slots, that is any number of slots: a batch is cut by how long its
histories are, whatever they were padded to, where that costs least by measure; and where a history begins
with one that was asked for lately, only what came since is computed, if the model allows (`prefixes`).
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from compression.releases.registry import Artefact, ArtefactInvalid, Registry
from inference import engines
from inference.batcher import Batcher, BatcherLimits
from inference.buckets import Buckets, fit, pad_rows
from inference.dispatcher import Lane
from inference.engines.base import GRAPHS, Engine, Shape, inputs_of, outputs_of
from inference.errors import EngineFailed, InferenceError, ModelUnavailable
from inference.lanes import LaneSpec
from inference.oip.graph_specs import specs
from inference.oip.models import Answer, Question
from inference.oip.prefixes import Prefixes
from inference.settings import InferenceSettings
from inference.types import Graph, Priority, Tensors

PREFIX: Final = "tailrace-"
# Of tensors that hold neither events nor candidates; the second axis of all others is the one or the other.
_OF_USERS: Final = frozenset(("lengths", "user_vector"))
_OF_CANDIDATES: Final = frozenset(("candidates", "candidate_categories", "scores"))


class _Bucket(NamedTuple):
    """What goes through an engine together; `candidates` is 0 for "encode", `slots` for "rank" and for scores
    without states."""

    graph: Graph
    slots: int
    candidates: int


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """One user of a question, as the batcher sees it: what it counts is lists, whoever asked for them."""

    question: Question
    row: int
    priority: Priority
    deadline_s: float | None
    tier: int = 0


class _Part(NamedTuple):
    """Rows of one question that follow one another."""

    question: Question
    first: int
    users: int

    def of(self, name: str) -> npt.NDArray[Any]:
        """An input."""
        return self.question.inputs[name][self.first : self.first + self.users]


class _Answer(NamedTuple):
    """A row of what an engine made of a batch."""

    outputs: Tensors
    row: int


class GraphModel:
    """One graph of one version."""

    platform = "tailrace_graph"

    def __init__(self, graph: Graph, owner: GraphSet) -> None:
        self.name = PREFIX + graph
        self.version = owner.version
        self.inputs, self.outputs = specs(graph, owner.shape)
        self.most = owner.most
        self.run: Callable[[Question], Awaitable[Tensors]] = partial(owner.run, graph)
        """What computes it; a server puts its gate in front."""

    async def infer(self, question: Question) -> Answer:
        return Answer(await self.run(question), self.version)


class GraphSet:
    """The graphs of a version on warmed engines, behind one batcher with a lane for each."""

    def __init__(
        self,
        version: str,
        pool: Mapping[str, Engine],
        buckets: Buckets,
        limits: BatcherLimits,
        prefixes: Prefixes | None = None,
    ) -> None:
        """`pool` by the name of the lane; each engine has run every shape of the buckets."""
        self.version = version
        self._engines = list(pool.values())
        self.shape = self._engines[0].model
        self.buckets = buckets
        self.most: Mapping[str, int] = {
            "users": buckets.batches[-1],
            "slots": buckets.histories[-1],
            "candidates": buckets.candidates[-1],
        }
        self.models = [GraphModel(graph, self) for graph in GRAPHS]
        self._batcher: Batcher[_Work, _Answer] = Batcher(
            [Lane(f"graphs-{name}", _Runner(engine, buckets, prefixes).run) for name, engine in pool.items()],
            limits,
        )

    @classmethod
    def open(cls, registry_root: str | Path, version: str, settings: InferenceSettings) -> GraphSet:
        """Verify, load and warm every bucket of every graph. Raises `ModelUnavailable` with the reason.

        Takes seconds: not for the event loop's thread.
        """
        try:
            artefact = Registry(registry_root).open(version)
        except ArtefactInvalid as error:
            raise ModelUnavailable(str(error)) from error
        buckets = settings.buckets().up_to(artefact.manifest.model.max_history)
        prefixes = Prefixes.of(artefact, settings.cache_mb)
        pool: dict[str, Engine] = {}
        cost_s: Mapping[Shape, float] = {}
        for spec in settings.lane_specs():
            pool[spec.name], cost_s = _warmed(artefact, buckets, spec, append=prefixes is not None)
        return cls(artefact.version, pool, buckets.with_costs(cost_s), settings.batcher_limits(), prefixes)

    async def run(self, graph: Graph, question: Question) -> Tensors:
        """Outputs in the shape of the question, whatever it was padded to."""
        inputs = question.inputs
        # "rank" is cut by lengths, and what has no slots is of one shape.
        sizes = [array.shape[1] for name, array in inputs.items() if graph != "rank" and _has_slots(name)]
        slots = fit(self.buckets.histories, sizes[0]) if sizes else 0
        candidates = 0
        if graph != "encode":
            candidates = fit(self.buckets.candidates, inputs["candidates"].shape[1])
        bucket = _Bucket(graph, slots, candidates)
        users = len(next(iter(inputs.values())))
        works = [_Work(question, row, question.priority, question.deadline_s) for row in range(users)]
        return _together(await self._batcher.submit(works, bucket), question)

    async def close(self, timeout_s: float = 10.0) -> None:
        """Finish what was accepted, then free the engines."""
        await self._batcher.drain(timeout_s)
        for engine in self._engines:
            engine.close()


def _warmed(
    artefact: Artefact, buckets: Buckets, spec: LaneSpec, *, append: bool
) -> tuple[Engine, Mapping[Shape, float]]:
    """An engine, and what each of its shapes costs."""
    engine = engines.create(spec.engine, spec.options)
    append = append and engine.keeps_states
    engine.load(artefact, (*GRAPHS, "append") if append else GRAPHS)
    try:
        cost_s = engine.warm_up(buckets.shapes(append=append, rank=True))
        for graph in GRAPHS:
            candidates = 0 if graph == "encode" else buckets.candidates[0]
            example = engine.example(Shape(graph, buckets.batches[0], buckets.histories[0], candidates))
            for name, output in engine.run(graph, example).items():
                if not np.isfinite(output).all():
                    raise ModelUnavailable(
                        f"{artefact.version}: {graph}: {name} holds numbers that are not finite"
                    )
    except EngineFailed as error:
        raise ModelUnavailable(f"{artefact.version}: {error}") from error
    return engine, cost_s


class _Runner:
    """An engine, called by one thread at a time even where a lane has given up a thread that hangs."""

    def __init__(self, engine: Engine, buckets: Buckets, prefixes: Prefixes | None) -> None:
        self._engine = engine
        self._buckets = buckets
        # Where states do not come back there is nothing to append to.
        self._prefixes = prefixes if engine.keeps_states else None
        self._lock = threading.Lock()

    def run(self, bucket: _Bucket, works: list[_Work]) -> list[_Answer]:
        """In a lane's thread: an answer for each, as few calls of the engine as its batch sizes allow."""
        most = self._buckets.batches[-1]
        with self._lock:
            return [
                answer
                for first in range(0, len(works), most)
                for answer in self._run_together(bucket, works[first : first + most])
            ]

    def _run_together(self, bucket: _Bucket, works: Sequence[_Work]) -> list[_Answer]:
        parts = _parts(works)
        wanted = {name for part in parts for name in part.question.outputs}
        names = [name for name in outputs_of(bucket.graph, self._engine.model) if name in wanted]
        if bucket.graph == "rank":
            outputs = self._cut(bucket, parts, names)
        else:
            batch = fit(self._buckets.batches, len(works))
            outputs = self._engine.run_for(bucket.graph, self._inputs(bucket, parts, batch), names)
        return [_Answer(outputs, row) for row in range(len(works))]

    def _inputs(self, bucket: _Bucket, parts: Sequence[_Part], batch: int) -> Tensors:
        """In the bucket's shape; slots beyond it are of nobody's history."""
        inputs: Tensors = {}
        for name in inputs_of(bucket.graph, self._engine.model):
            arrays = [part.of(name) for part in parts]
            if _has_slots(name):
                arrays = [array[:, : bucket.slots] for array in arrays]
            inputs[name] = _filled(arrays, name, bucket, batch)
        return inputs

    def _cut(self, bucket: _Bucket, parts: Sequence[_Part], names: Sequence[str]) -> Tensors:
        """The outputs of all rows, in order, each padded to little more than its own history."""
        lengths = np.concatenate([part.of("lengths") for part in parts])
        users, longest = len(lengths), fit(self._buckets.histories, int(lengths.max()))
        whole = self._inputs(bucket._replace(slots=longest), parts, users)
        outputs: Tensors = {}
        if self._prefixes is not None:
            answers = self._prefixes.rank(self._engine, self._buckets, whole)
            return {name: answers[name] for name in names}
        for cut in self._buckets.cuts(lengths, "rank"):
            inputs = {
                name: pad_rows(
                    array[cut.users, : cut.history] if _has_slots(name) else array[cut.users], cut.batch
                )
                for name, array in whole.items()
            }
            for name, answer in self._engine.run_for("rank", inputs, names).items():
                if name not in outputs:
                    outputs[name] = np.empty((users, *answer.shape[1:]), answer.dtype)
                outputs[name][cut.users] = answer[: len(cut.users)]
        return outputs


def _parts(works: Sequence[_Work]) -> list[_Part]:
    """In order, as few as there are."""
    parts: list[_Part] = []
    for work in works:
        if parts and parts[-1].question is work.question and sum(parts[-1][1:]) == work.row:
            parts[-1] = parts[-1]._replace(users=parts[-1].users + 1)
        else:
            parts.append(_Part(work.question, work.row, 1))
    return parts


def _filled(arrays: Sequence[npt.NDArray[Any]], name: str, bucket: _Bucket, batch: int) -> npt.NDArray[Any]:
    """One after another, padded to the bucket: slots beyond a history's length, candidates of row 0,
    and users beyond those there are."""
    size = bucket.slots if _has_slots(name) else bucket.candidates
    if name in _OF_USERS or all(array.shape[1] == size for array in arrays):
        return pad_rows(np.concatenate(arrays), batch)
    filled = np.zeros((batch, size, *arrays[0].shape[2:]), arrays[0].dtype)
    row = 0
    for array in arrays:
        within = (slice(row, row + len(array)), *(slice(length) for length in array.shape[1:]))
        filled[within] = array
        row += len(array)
    return filled


def _together(answers: Sequence[_Answer | InferenceError], question: Question) -> Tensors:
    """The outputs wanted, rows in order, as arrays of their own: the rest of a batch is not kept alive.
    Raises the first error."""
    parts: list[tuple[Tensors, int, int]] = []
    for answer in answers:
        if isinstance(answer, InferenceError):
            raise answer
        if parts and parts[-1][0] is answer.outputs and parts[-1][2] == answer.row:
            parts[-1] = (answer.outputs, parts[-1][1], answer.row + 1)
        else:
            parts.append((answer.outputs, answer.row, answer.row + 1))
    return {
        name: np.concatenate(
            [_narrowed(name, outputs[name][start:end], question.inputs) for outputs, start, end in parts]
        )
        for name in question.outputs
    }


def _narrowed(name: str, rows: npt.NDArray[Any], inputs: Tensors) -> npt.NDArray[Any]:
    """Without what was padded."""
    if name in _OF_USERS:
        return rows
    return rows[:, : inputs["items" if _has_slots(name) else "candidates"].shape[1]]


def _has_slots(name: str) -> bool:
    """Whether a tensor's second axis is events."""
    return name not in _OF_USERS and name not in _OF_CANDIDATES
