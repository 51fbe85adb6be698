"""The network as four ONNX graphs, checked against torch before anybody sees them.

encode and score are the two halves for a cache of encoded histories, append is one more event of such
a history; rank is encode and score in one. They are written out operator by operator, because what
serving costs is decided here: no more operators than the arithmetic needs, in the forms that engines
fuse, constants folded. `check_parity` holds them to the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from compression.evaluation.scoring import to_history
from compression.onnx_writer import OnnxWriter, by_lag
from compression.releases.registry import ModelShape
from compression.training.model import MASKED, NORM_EPS, Block, Encoded, History, Recommender
from compression.training.weights import TABLES, codes
from features.encoding import HistoryArrays

TOLERANCE: Final = 1e-4
GRAPHS: Final = {"encode": "encode.onnx", "score": "score.onnx", "rank": "rank.onnx", "append": "append.onnx"}
PARITY_LENGTHS: Final = (0, 1, 2, 25, 50, 99, 100)

_HISTORY: Final = ("items", "categories", "behaviors", "gaps", "lengths")
_CANDIDATES: Final = ("candidates", "candidate_categories")
Arrays = dict[str, npt.NDArray[Any]]


class ParityError(RuntimeError):
    """An exported graph does not answer as the network does."""


def _inputs(shape: ModelShape) -> Mapping[str, Sequence[str]]:
    states = shape.state_names
    return {
        "encode": _HISTORY,
        "score": (*states, "lengths", "user_vector", *_CANDIDATES),
        "rank": (*_HISTORY, *_CANDIDATES),
        "append": (*states, *_HISTORY),
    }


def _outputs(shape: ModelShape) -> Mapping[str, Sequence[str]]:
    return {
        "encode": ("user_vector", *shape.state_names),
        "score": ("scores",),
        "rank": ("scores", "user_vector"),
        "append": ("user_vector", *shape.new_state_names),
    }


def export(model: Recommender, folder: Path, *, rounded: bool = False) -> dict[str, str]:
    """Write the graphs, each in one file, every batch dimension dynamic; graph name to file name. Tables
    that are `rounded` are written as 8-bit codes, and become floats row by row as they are looked up."""
    for graph, file in GRAPHS.items():
        writer = _Writer(model, rounded)
        if graph in ("encode", "rank"):
            writer.encode(states=graph == "encode")
        if graph in ("score", "rank"):
            writer.score()
        if graph == "append":
            writer.append()
        (folder / file).write_bytes(writer.graph(graph).SerializeToString())
    return dict(GRAPHS)


def check_parity(model: Recommender, folder: Path, *, seed: int = 11) -> float:
    """The largest difference between the graphs and the network, over random histories of every
    awkward length; `ParityError` above the tolerance."""
    import onnxruntime

    model = model.eval()
    worst = 0.0
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for graph, file in GRAPHS.items():
        session = onnxruntime.InferenceSession(
            (folder / file).read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        for users, slots, candidates in ((1, 1, 1), (7, 25, 50), (9, model.shape.max_history, 20)):
            arrays = random_inputs(model, users=users, slots=slots, candidates=candidates, seed=seed)
            if graph == "append":
                arrays = _newest_apart(arrays)
            expected = _expected(model, graph, arrays)
            names = _outputs(model.shape)[graph]
            actual = session.run(list(names), {name: arrays[name] for name in _inputs(model.shape)[graph]})
            for name, theirs in zip(names, actual, strict=True):
                ours = expected[name].numpy()
                if theirs.shape != ours.shape or not np.isfinite(theirs).all():
                    raise ParityError(f"{graph}: {name} has the wrong shape or is not finite")
                worst = max(worst, float(np.abs(theirs - ours).max()))
    if worst > TOLERANCE:
        raise ParityError(f"the graphs differ from the network by {worst:.2e}, more than {TOLERANCE}")
    return worst


def random_inputs(model: Recommender, *, users: int, slots: int, candidates: int, seed: int) -> Arrays:
    """Inputs of every graph by name, for random right-padded histories."""
    rng, shape = np.random.default_rng(seed), model.shape
    allowed = [length for length in PARITY_LENGTHS if length <= slots]
    lengths = np.array([allowed[user % len(allowed)] for user in range(users)][::-1], np.int32)
    valid = np.arange(slots) < lengths[:, None]

    def rows(low: int, high: int) -> npt.NDArray[np.int32]:
        return np.where(valid, rng.integers(low, high, valid.shape), 0).astype(np.int32)

    histories = HistoryArrays(
        items=rows(1, shape.item_rows),
        categories=rows(1, shape.category_rows),
        behaviors=rows(1, 5),
        gaps=rows(1, 32),
        lengths=lengths,
    )
    with torch.inference_mode():
        encoded = model.encode(to_history(histories))
    return {
        **histories.tensors(),
        "candidates": rng.integers(1, shape.item_rows, (users, candidates)).astype(np.int32),
        "candidate_categories": rng.integers(1, shape.category_rows, (users, candidates)).astype(np.int32),
        "user_vector": encoded.user_vector.numpy(),
        **{name: state.numpy() for name, state in zip(shape.state_names, encoded.states, strict=True)},
    }


def _newest_apart(arrays: Arrays) -> Arrays:
    """The newest event of each history as the one to append to those before it."""
    before = np.maximum(arrays["lengths"] - 1, 0)
    newest = {name: np.take_along_axis(arrays[name], before[:, None], 1) for name in _HISTORY[:-1]}
    return {**arrays, **newest, "lengths": before}


def _expected(model: Recommender, graph: str, arrays: Arrays) -> Mapping[str, Tensor]:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    states = tuple(tensors[name] for name in model.shape.state_names)
    history = History(*(tensors[name] for name in _HISTORY))
    with torch.inference_mode():
        if graph == "append":
            encoded = model.append(states, history)
        elif graph == "score":
            encoded = Encoded(tensors["user_vector"], states)
        else:
            encoded = model.encode(history)
        if graph in ("encode", "append"):
            return dict(
                zip(_outputs(model.shape)[graph], (encoded.user_vector, *encoded.states), strict=True)
            )
        scores = model.score(encoded, tensors["lengths"], *(tensors[name] for name in _CANDIDATES))
    return {"scores": scores, "user_vector": encoded.user_vector}


@dataclass(slots=True)
class _Writer(OnnxWriter):
    network: Recommender
    rounded: bool = False
    # Keys and values by layer, where they are made in the graph that reads them.
    encoded: list[str] = field(default_factory=list)

    def graph(self, name: str) -> onnx.ModelProto:
        shape = self.network.shape
        model = self.model(
            name,
            [_value(tensor, shape, name) for tensor in _inputs(shape)[name]],
            [_value(tensor, shape, name) for tensor in _outputs(shape)[name]],
        )
        onnx.checker.check_model(model, full_check=True)
        return model

    def encode(self, *, states: bool = True) -> None:
        """History tensors to user_vector, keys and values; without `states` these are no outputs, but
        left for `score`."""
        blocks = self.blocks
        names = self.network.shape.state_names if states else [""] * 2 * len(blocks)
        x, size = self.tokens(), self.size("items", 1)
        for place, block in enumerate(blocks[:-1]):
            normed, key, value = self.keys_values(block, x, names[2 * place : 2 * place + 2])
            reach = self.added_to_all(self.event_reach(block), size)
            x = self.attend(block, x, normed, key, value, reach)
            self.encoded += (key, value)
        normed, key, value = self.keys_values(blocks[-1], x, names[-2:])
        self.encoded += (key, value)
        newest = self.op("Max", self.op("Sub", "lengths", self.int32(1)), self.int32(0))
        reach = self.added(self.event_reach(blocks[-1]), newest, size)
        newest = self.op("Unsqueeze", self.op("Cast", newest, to=TensorProto.INT64), self.ints([1, 2]))
        x, normed = (self.op("GatherND", tensor, newest, batch_dims=1) for tensor in (x, normed))
        x = self.attend(blocks[-1], x, normed, key, value, reach)
        known = self.op("Greater", self.op("Unsqueeze", "lengths", self.ints([1])), self.int32(0))
        nobody = self.weight(self.network.no_history)
        state = self.op("Where", known, self.op("Squeeze", x, self.ints([1])), nobody)
        self.norm(self.network.final_norm, state, output="user_vector")

    def append(self) -> None:
        """Keys, values and one more event to user_vector and that event's key and value.

        The event attends to itself beside the history, not within it: nothing is copied to make room."""
        x, shape = self.tokens(), self.network.shape
        size = self.size(shape.state_names[0], 1)
        for layer, block in enumerate(self.blocks):
            key, value = shape.state_names[2 * layer : 2 * layer + 2]
            new = shape.new_state_names[2 * layer : 2 * layer + 2]
            normed, own_key, own_value = self.keys_values(block, x, new)
            own = self.op("ReduceSum", self.op("Mul", normed, own_key), self.ints([-1]), keepdims=1)
            own = self.op("Add", own, self.weight(block.event_reach[:1]))
            logits = self.op("MatMul", normed, self.op("Transpose", key, perm=[0, 2, 1]))
            reach = self.added(self.event_reach(block, itself=MASKED), "lengths", size)
            logits = self.op("Concat", self.op("Add", logits, reach), own, axis=-1)
            weights = self.op("Softmax", logits, axis=-1)
            old = self.op("Slice", weights, self.ints([0]), self.ints([-1]), self.ints([2]))
            last = self.op("Slice", weights, self.ints([-1]), self.ints([2**62]), self.ints([2]))
            seen = self.op("Add", self.op("MatMul", old, value), self.op("Mul", last, own_value))
            x = self.feed_forward(block, self.op("Add", x, seen))
        self.norm(self.network.final_norm, self.op("Squeeze", x, self.ints([1])), output="user_vector")

    def score(self) -> None:
        """Candidates, lengths, user_vector, keys and values to scores."""
        model, states = self.network, self.encoded or self.network.shape.state_names
        item, category = self.rows("items", "candidates"), self.rows("categories", "candidate_categories")
        vectors = self.op("Add", item, category)
        x = self.op("Add", vectors, self.weight(model.candidate_mark()))
        size = self.size(states[0], 1)
        one = self.op("Concat", self.op("Shape", "lengths"), self.ints([1, 1]), axis=0)
        for layer, block in enumerate(self.blocks):
            nothing = (block.nothing_key, block.nothing_value)
            key, value = (
                self.op("Concat", state, self.op("Expand", self.weight(slot[None, None]), one), axis=1)
                for state, slot in zip(states[2 * layer : 2 * layer + 2], nothing, strict=True)
            )
            back = by_lag(block.candidate_reach[None], MASKED, places=model.shape.max_history + 1, shift=-1)
            reach = self.op(
                "Concat",
                self.added(back, "lengths", size),
                self.op("Expand", self.weight(block.nothing_reach[None, None]), one),
                axis=2,
            )
            x = self.attend(block, x, self.norm(block.attention_norm, x), key, value, reach)
        self.readout(x, vectors)

    def readout(self, x: str, vectors: str) -> None:
        """As `Recommender.readout_scores`: v·(x - v - mark) f + v·u a is v·(x - v) f + v·(u a - mark f)."""
        model = self.network
        learned = self.op("MatMul", self.norm(model.final_norm, x), self.weight(model.readout.weight.T))
        found = self.op("Mul", self.op("Sub", x, vectors), vectors)
        found = self.op("ReduceSum", found, self.ints([-1]), keepdims=0)
        found = self.op("Mul", found, self.weight(model.found_scale))
        asked = self.op("Mul", "user_vector", self.weight(model.affinity_scale))
        asked = self.op("Sub", asked, self.weight(model.candidate_mark() * model.found_scale))
        fit = self.op("MatMul", vectors, self.op("Unsqueeze", asked, self.ints([2])))
        scores = self.op("Squeeze", self.op("Add", learned, fit), self.ints([2]))
        self.op("Add", scores, found, output="scores")

    @property
    def blocks(self) -> list[Block]:
        return [block for block in self.network.blocks if isinstance(block, Block)]

    def keys_values(self, block: Block, x: str, names: Sequence[str]) -> tuple[str, str, str]:
        """What is attended with, and to: keys and values, by these names where they have any."""
        normed = self.norm(block.attention_norm, x)
        scale = self.network.shape.dim**-0.5
        key = self.op("MatMul", normed, self.weight(block.key.weight.T * scale), output=names[0])
        value = self.op("MatMul", normed, self.weight(block.value.weight.T), output=names[1])
        return normed, key, value

    def event_reach(self, block: Block, *, itself: float | None = None) -> Tensor:
        """Seen from the event of each place; `itself` instead of what it has for itself."""
        reach = block.event_reach[None].detach().clone()
        if itself is not None:
            reach[:, 0] = itself
        return by_lag(reach, MASKED, places=self.network.shape.max_history)

    def attend(self, block: Block, x: str, normed: str, key: str, value: str, reach: str) -> str:
        """`Block.forward`."""
        logits = self.op("MatMul", normed, self.op("Transpose", key, perm=[0, 2, 1]))
        weights = self.op("Softmax", self.op("Add", logits, reach), axis=-1)
        return self.feed_forward(block, self.op("Add", x, self.op("MatMul", weights, value)))

    def feed_forward(self, block: Block, x: str) -> str:
        wide = self.op("MatMul", self.norm(block.ffn_norm, x), self.weight(block.widen.weight.T))
        return self.op("Add", x, self.op("MatMul", self.op("Relu", wide), self.weight(block.narrow.weight.T)))

    def norm(self, norm: nn.RMSNorm, x: str, *, output: str = "") -> str:
        """In the form that ONNX Runtime and OpenVINO recognise and fuse."""
        power = self.op("Pow", x, self.weight(torch.tensor(2.0)))
        mean = self.op("ReduceMean", power, self.ints([-1]), keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean, self.weight(torch.tensor(NORM_EPS))))
        return self.op("Mul", self.op("Div", x, root), self.weight(norm.weight), output=output)

    def tokens(self) -> str:
        """Events, or the one event, as the network reads them."""
        x = self.op("Add", self.rows("items", "items"), self.rows("categories", "categories"))
        rest = self.op("Add", self.rows("behaviors", "behaviors"), self.rows("gaps", "gaps"))
        return self.op("Add", x, rest)

    def rows(self, table: str, places: str) -> str:
        """The rows of a table that an input asks for."""
        weight, name = getattr(self.network, table).weight, f"{table}.weight"
        if not self.rounded or table not in TABLES:
            return self.op("Gather", self.weight(weight, name), places)
        counted, step = codes(weight)
        whole = self.op("Gather", self.constant(counted.numpy(), f"{name}.codes"), places)
        found = self.op("Cast", whole, to=TensorProto.FLOAT)
        return self.op("Mul", found, self.op("Gather", self.weight(step, f"{name}.step"), places))

    def size(self, tensor: str, axis: int) -> str:
        """[1]."""
        return self.op("Shape", tensor, start=axis, end=axis + 1)

    def int32(self, value: int) -> str:
        return self.constant(np.array(value, np.int32))


def _value(tensor: str, shape: ModelShape, graph: str) -> onnx.ValueInfoProto:
    """An input or output of a graph: its type, and which of its sizes are free."""
    states: dict[str, list[str | int]] = {name: ["users", "slots", shape.dim] for name in shape.state_names}
    states |= {name: ["users", 1, shape.dim] for name in shape.new_state_names}
    sizes: dict[str, list[str | int]] = {
        "lengths": ["users"],
        "user_vector": ["users", shape.dim],
        **states,
        "scores": ["users", "candidates"],
        "candidates": ["users", "candidates"],
        "candidate_categories": ["users", "candidates"],
    }
    floats = ("user_vector", *states, "scores")
    kind = TensorProto.FLOAT if tensor in floats else TensorProto.INT32
    rows: list[str | int] = ["users", 1 if graph == "append" else "slots"]
    return helper.make_tensor_value_info(tensor, kind, sizes.get(tensor, rows))
