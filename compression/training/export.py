"""The network as four ONNX graphs, checked against torch before anybody sees them.

encode and score are the two halves for a cache of encoded histories, append is one more event of such
a history; rank is encode and score in one. They are written out operator by operator, because what
serving costs is decided here: no more operators than the arithmetic needs, in the forms that engines
fuse, constants folded. `check_parity` holds them to the network.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from compression.onnx_writer import OnnxWriter
from compression.releases.registry import ModelShape
from compression.training.model import NORM_EPS, Block, Encoded, History, Recommender, reach_table
from compression.training.weights import TABLES, codes
from features.encoding import HistoryArrays

TOLERANCE: Final = 1e-4
GRAPHS: Final = {"encode": "encode.onnx", "score": "score.onnx", "rank": "rank.onnx", "append": "append.onnx"}
PARITY_LENGTHS: Final = (0, 1, 2, 25, 50, 99, 100)

_HISTORY: Final = ("items", "categories", "behaviors", "gaps", "lengths")
_STATES: Final = ("user_vector", "keys", "values")
_CANDIDATES: Final = ("candidates", "candidate_categories")
_INPUTS: Final = {
    "encode": _HISTORY,
    "score": ("keys", "values", "lengths", "user_vector", *_CANDIDATES),
    "rank": (*_HISTORY, *_CANDIDATES),
    "append": ("keys", "values", *_HISTORY),
}
_OUTPUTS: Final = {
    "encode": _STATES,
    "score": ("scores",),
    "rank": ("scores", "user_vector"),
    "append": ("user_vector", "new_key", "new_value"),
}
Arrays = dict[str, npt.NDArray[Any]]


class ParityError(RuntimeError):
    """An exported graph does not answer as the network does."""


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
            actual = session.run(list(_OUTPUTS[graph]), {name: arrays[name] for name in _INPUTS[graph]})
            for name, theirs in zip(_OUTPUTS[graph], actual, strict=True):
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
        "keys": encoded.keys.numpy(),
        "values": encoded.values.numpy(),
    }


def _newest_apart(arrays: Arrays) -> Arrays:
    """The newest event of each history as the one to append to those before it."""
    before = np.maximum(arrays["lengths"] - 1, 0)
    newest = {name: np.take_along_axis(arrays[name], before[:, None], 1) for name in _HISTORY[:-1]}
    return {**arrays, **newest, "lengths": before}


def _expected(model: Recommender, graph: str, arrays: Arrays) -> Mapping[str, Tensor]:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with torch.inference_mode():
        if graph == "append":
            event = History(*(tensors[name] for name in _HISTORY))
            return dict(
                zip(_OUTPUTS[graph], model.append(tensors["keys"], tensors["values"], event), strict=True)
            )
        if graph == "score":
            encoded = Encoded(*(tensors[name] for name in _STATES))
        else:
            encoded = model.encode(History(*(tensors[name] for name in _HISTORY)))
        if graph == "encode":
            return encoded._asdict()
        scores = model.score(encoded, tensors["lengths"], *(tensors[name] for name in _CANDIDATES))
    return {"scores": scores, "user_vector": encoded.user_vector}


@dataclass(slots=True)
class _Writer(OnnxWriter):
    network: Recommender
    rounded: bool = False
    # Keys and values by layer, where they are made in the graph that reads them: never put together.
    encoded: dict[str, list[str]] = field(default_factory=dict)

    def graph(self, name: str) -> onnx.ModelProto:
        shape = self.network.shape
        model = self.model(
            name,
            [_value(tensor, shape, name) for tensor in _INPUTS[name]],
            [_value(tensor, shape, name) for tensor in _OUTPUTS[name]],
        )
        onnx.checker.check_model(model, full_check=True)
        return model

    def encode(self, *, states: bool = True) -> None:
        """History tensors to user_vector, keys and values; without `states` these are no outputs, but
        left for `score`."""
        blocks = [block for block in self.network.blocks if isinstance(block, Block)]
        x = self.tokens()
        slots = self.op("Range", self.ints(0), self.size("items", 1), self.ints(1))
        keys: list[str] = []
        values: list[str] = []
        for block in blocks[:-1]:
            normed, key, value = self.keys_values(block, x, keys, values)
            reach = self.event_reach(block, self.op("Unsqueeze", slots, self.ints([1])), slots)
            x = self.attend(block, x, normed, key, value, reach)
        normed, key, value = self.keys_values(blocks[-1], x, keys, values)
        newest = self.op("Max", self.op("Sub", "lengths", self.int32(1)), self.int32(0))
        newest = self.op("Unsqueeze", self.op("Cast", newest, to=TensorProto.INT64), self.ints([1, 2]))
        reach = self.event_reach(blocks[-1], newest, slots)
        x, normed = (self.op("GatherND", tensor, newest, batch_dims=1) for tensor in (x, normed))
        x = self.attend(blocks[-1], x, normed, key, value, reach)
        known = self.op("Greater", self.op("Unsqueeze", "lengths", self.ints([1])), self.int32(0))
        nobody = self.weight(self.network.no_history)
        state = self.op("Where", known, self.op("Squeeze", x, self.ints([1])), nobody)
        self.norm(self.network.final_norm, state, output="user_vector")
        if states:
            self.stack(keys, output="keys")
            self.stack(values, output="values")
        else:
            self.encoded = {"keys": keys, "values": values}

    def append(self) -> None:
        """Keys, values and one more event to user_vector and that event's key and value.

        The event attends to itself beside the history, not within it: nothing is copied to make room."""
        x = self.tokens()
        slots = self.op("Range", self.ints(0), self.size("keys", 3), self.ints(1))
        before = self.op("Unsqueeze", self.op("Cast", "lengths", to=TensorProto.INT64), self.ints([1, 2]))
        index = self.op("Max", self.op("Sub", before, slots), self.ints(0))
        keys: list[str] = []
        values: list[str] = []
        for layer, block in enumerate(block for block in self.network.blocks if isinstance(block, Block)):
            normed, own_key, own_value = self.keys_values(block, x, keys, values)
            key, value = (self.layer(states, layer) for states in ("keys", "values"))
            own = self.op("ReduceSum", self.op("Mul", normed, own_key), self.ints([-1]), keepdims=1)
            own = self.op("Add", own, self.weight(block.event_reach[:1]))
            logits = self.op("MatMul", normed, self.op("Transpose", key, perm=[0, 2, 1]))
            reach = self.op("Gather", self.weight(reach_table(block.event_reach[1:])), index)
            logits = self.op("Concat", self.op("Add", logits, reach), own, axis=-1)
            weights = self.op("Softmax", logits, axis=-1)
            old = self.op("Slice", weights, self.ints([0]), self.ints([-1]), self.ints([2]))
            new = self.op("Slice", weights, self.ints([-1]), self.ints([2**62]), self.ints([2]))
            seen = self.op("Add", self.op("MatMul", old, value), self.op("Mul", new, own_value))
            x = self.feed_forward(block, self.op("Add", x, seen))
        self.norm(self.network.final_norm, self.op("Squeeze", x, self.ints([1])), output="user_vector")
        self.stack(keys, output="new_key")
        self.stack(values, output="new_value")

    def score(self) -> None:
        """Candidates, lengths, user_vector, keys and values to scores."""
        model = self.network
        item, category = self.rows("items", "candidates"), self.rows("categories", "candidate_categories")
        vectors = self.op("Add", item, category)
        x = self.op("Add", vectors, self.weight(model.candidate_mark()))
        size = self.size("items", 1) if self.encoded else self.size("keys", 3)
        slots = self.op("Range", self.ints(0), size, self.ints(1))
        lengths = self.op("Unsqueeze", self.op("Cast", "lengths", to=TensorProto.INT64), self.ints([1, 2]))
        index = self.op("Max", self.op("Sub", lengths, slots), self.ints(0))
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        one = self.op("Concat", self.op("Shape", "lengths"), self.ints([1, 1]), axis=0)
        for layer, block in enumerate(blocks):
            nothing = (block.nothing_key, block.nothing_value)
            key, value = (
                self.op(
                    "Concat",
                    self.layer(states, layer),
                    self.op("Expand", self.weight(slot[None, None]), one),
                    axis=1,
                )
                for states, slot in zip(("keys", "values"), nothing, strict=True)
            )
            reach = self.op(
                "Concat",
                self.op("Gather", self.weight(reach_table(block.candidate_reach)), index),
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

    def keys_values(self, block: Block, x: str, keys: list[str], values: list[str]) -> tuple[str, str, str]:
        """What is attended with and to; keys and values are listed, too."""
        normed = self.norm(block.attention_norm, x)
        scale = self.network.shape.dim**-0.5
        key = self.op("MatMul", normed, self.weight(block.key.weight.T * scale))
        value = self.op("MatMul", normed, self.weight(block.value.weight.T))
        keys.append(key)
        values.append(value)
        return normed, key, value

    def event_reach(self, block: Block, places: str, slots: str) -> str:
        back = self.op("Add", self.op("Sub", places, slots), self.ints(1))
        return self.op(
            "Gather", self.weight(reach_table(block.event_reach)), self.op("Max", back, self.ints(0))
        )

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

    def layer(self, states: str, layer: int) -> str:
        """The keys or values [B, L, D] of one layer."""
        if self.encoded:
            return self.encoded[states][layer]
        return self.op("Squeeze", self.op("Gather", states, self.ints(layer), axis=1), self.ints([1]))

    def stack(self, layers: list[str], *, output: str) -> None:
        """Keys or values [B, L, D] of all layers as [B, layers, 1, L, D]."""
        apart = [self.op("Unsqueeze", layer, self.ints([1, 2])) for layer in layers]
        self.op("Concat", *apart, axis=1, output=output)

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
        return self.op("Squeeze", self.op("Shape", tensor, start=axis, end=axis + 1), self.ints([0]))

    def int32(self, value: int) -> str:
        return self.constant(np.array(value, np.int32))


def _value(tensor: str, shape: ModelShape, graph: str) -> onnx.ValueInfoProto:
    """An input or output of a graph: its type, and which of its sizes are free."""
    states: list[str | int] = ["users", shape.layers, shape.heads, "slots", shape.dim // shape.heads]
    new: list[str | int] = [*states[:3], 1, states[4]]
    sizes: dict[str, list[str | int]] = {
        "lengths": ["users"],
        "user_vector": ["users", shape.dim],
        "keys": states,
        "values": states,
        "new_key": new,
        "new_value": new,
        "scores": ["users", "candidates"],
        "candidates": ["users", "candidates"],
        "candidate_categories": ["users", "candidates"],
    }
    floats = ("user_vector", "keys", "values", "new_key", "new_value", "scores")
    kind = TensorProto.FLOAT if tensor in floats else TensorProto.INT32
    rows: list[str | int] = ["users", 1 if graph == "append" else "slots"]
    return helper.make_tensor_value_info(tensor, kind, sizes.get(tensor, rows))
