"""A retriever as ONNX graphs, checked against torch before anybody sees them.

encode makes a history the user vector, score takes that and candidates, rank is both in one. There is no
append: positions are counted from the newest event backwards, so one event more changes every state before
it. All networks read one table, whose rows are their rows side by side; of the last layer only the newest
event is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper
from torch import nn

from compression.attention.base import HIDDEN
from compression.attention.full import written
from compression.evaluation.scoring import to_history
from compression.onnx_writer import OnnxWriter
from compression.retrieval.network import FeedForward, Layer, RetrievalNetwork
from compression.retrieval.retriever import Retriever
from compression.training.export import ParityError
from features.encoding import BEHAVIOR_ROWS, GAP_ROWS, HistoryArrays

TOLERANCE: Final = 1e-4
"""Of the largest difference, relative to the largest number there is where that is above 1."""
GRAPHS: Final = {"encode": "encode.onnx", "score": "score.onnx", "rank": "rank.onnx"}

_TABLE: Final = "items.weight"
_HISTORY: Final = ("items", "categories", "behaviors", "gaps", "lengths")
# Categories are asked for and not read, so that who asks for a list need not know which network answers.
_INPUTS: Final = {
    "encode": _HISTORY,
    "score": ("user_vector", "candidates"),
    "rank": (*_HISTORY, "candidates", "candidate_categories"),
}
_OUTPUTS: Final = {"encode": ("user_vector",), "score": ("scores",), "rank": ("scores", "user_vector")}
Arrays = dict[str, npt.NDArray[Any]]


def export(retriever: Retriever, folder: Path) -> dict[str, str]:
    """Write the graphs, each in one file, every batch dimension dynamic; graph name to file name."""
    for graph, file in GRAPHS.items():
        writer = _Writer(retriever)
        if graph != "score":
            writer.encode()
        if graph != "encode":
            writer.score()
        (folder / file).write_bytes(writer.graph(graph).SerializeToString())
    return dict(GRAPHS)


def check_parity(retriever: Retriever, folder: Path, *, seed: int = 11) -> float:
    """The largest difference between the graphs and the networks, over random histories of every awkward
    length; `ParityError` above the tolerance."""
    import onnxruntime

    retriever = retriever.eval()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    worst = 0.0
    for graph, file in GRAPHS.items():
        session = onnxruntime.InferenceSession(
            (folder / file).read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        for users, slots, candidates in ((1, 1, 1), (7, 25, 50), (9, retriever.max_history, 20)):
            arrays = random_inputs(
                retriever,
                users=users,
                slots=min(slots, retriever.max_history),
                candidates=candidates,
                seed=seed,
            )
            actual = session.run(list(_OUTPUTS[graph]), {name: arrays[name] for name in _INPUTS[graph]})
            for name, theirs in zip(_OUTPUTS[graph], actual, strict=True):
                ours = arrays[name]
                if theirs.shape != ours.shape or not np.isfinite(theirs).all():
                    raise ParityError(f"{graph}: {name} has the wrong shape or is not finite")
                worst = max(worst, float(np.abs(theirs - ours).max() / max(1.0, np.abs(ours).max())))
    if worst > TOLERANCE:
        raise ParityError(f"the graphs differ from the networks by {worst:.2e}, more than {TOLERANCE}")
    return worst


def random_inputs(retriever: Retriever, *, users: int, slots: int, candidates: int, seed: int) -> Arrays:
    """Inputs and outputs of every graph by name, for random right-padded histories from full to empty."""
    rng = np.random.default_rng(seed)
    rows = retriever.members[0].config.item_rows
    lengths = np.linspace(slots, 0 if users > 1 else slots, users).astype(np.int32)
    valid = np.arange(slots) < lengths[:, None]

    def drawn(high: int) -> npt.NDArray[np.int32]:
        return np.where(valid, rng.integers(1, high, valid.shape), 0).astype(np.int32)

    histories = HistoryArrays(
        items=drawn(rows),
        categories=np.zeros(valid.shape, np.int32),
        behaviors=drawn(BEHAVIOR_ROWS),
        gaps=drawn(GAP_ROWS),
        lengths=lengths,
    )
    asked = rng.integers(1, rows, (users, candidates)).astype(np.int32)
    with torch.inference_mode():
        vectors = retriever.user_vectors(to_history(histories))
        scores = retriever.score(vectors, torch.from_numpy(asked))
    return {
        **histories.tensors(),
        "candidates": asked,
        "candidate_categories": np.zeros_like(asked),
        "user_vector": vectors.numpy(),
        "scores": scores.numpy(),
    }


@dataclass(slots=True)
class _Writer(OnnxWriter):
    retriever: Retriever
    # By name: what is the same for every network and layer is written once.
    shared: dict[str, str] = field(default_factory=dict)

    def graph(self, name: str) -> onnx.ModelProto:
        dim = self.retriever.dim
        model = self.model(
            name,
            [_value(tensor, dim) for tensor in _INPUTS[name]],
            [_value(tensor, dim) for tensor in _OUTPUTS[name]],
        )
        onnx.checker.check_model(model, full_check=True)
        return model

    def encode(self) -> None:
        """History tensors to user_vector."""
        rows = self.op("Gather", self.weight(self.retriever.item_table(), _TABLE), "items")
        self._places()
        vectors: list[str] = []
        start = 0
        for network in self.retriever.members:
            end = start + network.config.dim
            own = self.op("Slice", rows, self.ints([start]), self.ints([end]), self.ints([2]))
            vectors.append(self.user_vector(network, own if len(self.retriever.networks) > 1 else rows))
            start = end
        found = self.op("Concat", *vectors, axis=1) if len(vectors) > 1 else vectors[0]
        known = self.op("Greater", "lengths", self.constant(np.array(0, np.int32)))
        known = self.op("Unsqueeze", known, self.ints([1]))
        self.op("Where", known, found, self.weight(torch.zeros(1)), output="user_vector")

    def score(self) -> None:
        """Candidates and user_vector to scores."""
        rows = self.op("Gather", self.weight(self.retriever.item_table(), _TABLE), "candidates")
        scores = self.op("MatMul", rows, self.op("Unsqueeze", "user_vector", self.ints([2])))
        self.op("Squeeze", scores, self.ints([2]), output="scores")

    def user_vector(self, network: RetrievalNetwork, rows: str) -> str:
        """`Retriever.user_vectors`' part of one network, [B, d], from its rows [B, L, d]."""
        x = self.tokens(network, rows)
        layers = cast(list[Layer], list(network.layers))
        slots = network.config.max_history
        for layer in layers[:-1]:
            x = self.layer(layer, x, slots, newest=False)
        x = self.op("Squeeze", self.layer(layers[-1], x, slots, newest=True), self.ints([1]))
        return self.norm(network.final_norm, x, share=1 / len(self.retriever.networks))

    def tokens(self, network: RetrievalNetwork, rows: str) -> str:
        """`RetrievalNetwork.tokens`."""
        x = self.op("Mul", rows, self.weight(torch.tensor(math.sqrt(network.config.dim))))
        for table, places in (
            (network.positions, self.shared["back"]),
            (network.behaviors, "behaviors"),
            (network.gaps, "gaps"),
        ):
            if table is not None:
                x = self.op("Add", x, self.op("Gather", self.weight(table.weight), places))
        return x

    def layer(self, layer: Layer, x: str, slots: int, *, newest: bool) -> str:
        """`Layer.forward` in evaluation; of the `newest` event alone, [B, 1, d], where no more is read."""
        attention = written(layer.attention)
        normed = self.norm(layer.attention_norm, x)
        asking = normed
        if newest:
            x, asking = (self.op("GatherND", one, self.shared["newest"], batch_dims=1) for one in (x, normed))
        heads = attention.heads
        scale = (attention.out.in_features // heads) ** -0.5
        query = self.heads(self.linear(attention.query, asking, scale), heads)
        key = self.heads(self.linear(attention.key, normed), heads)
        value = self.heads(self.linear(attention.value, normed), heads)
        turned = self.op("Transpose", key, perm=[0, 2, 1] if heads == 1 else [0, 1, 3, 2])
        logits = self.op(
            "Add", self.op("MatMul", query, turned), self.bias(layer, heads, slots, newest=newest)
        )
        found = self.op("MatMul", self.op("Softmax", logits, axis=-1), value)
        if heads > 1:
            found = self.op("Transpose", found, perm=[0, 2, 1, 3])
            found = self.op("Reshape", found, self.ints([0, 0, attention.out.in_features]))
        x = self.op("Add", x, self.linear(attention.out, found))
        return self.op("Add", x, self.feed_forward(layer.ffn, self.norm(layer.ffn_norm, x)))

    def bias(self, layer: Layer, heads: int, slots: int, *, newest: bool) -> str:
        """What is added to the logits by how many events back a slot lies, minus a lot where it lies ahead:
        [L, L] or [heads, L, L], and of the newest event [B, 1, L] or [B, heads, 1, L]."""
        reach = layer.reach
        table = torch.zeros(heads, slots) if reach is None else reach.detach()
        table = torch.cat([torch.full((heads, 1), HIDDEN), table], 1)
        ahead = self.shared["newest back"] if newest else self.shared["events back"]
        if heads == 1:
            return self.op("Gather", self.weight(table[0]), ahead)
        perm = [0, 3, 1, 2] if newest else [2, 0, 1]
        return self.op("Transpose", self.op("Gather", self.weight(table.T), ahead), perm=perm)

    def heads(self, x: str, heads: int) -> str:
        """[B, T, d] to [B, heads, T, d / heads]; of one head as it is."""
        if heads == 1:
            return x
        return self.op("Transpose", self.op("Reshape", x, self.ints([0, 0, heads, -1])), perm=[0, 2, 1, 3])

    def feed_forward(self, ffn: FeedForward, x: str) -> str:
        wide = self.linear(ffn.widen, x)
        if ffn.activation == "relu":
            wide = self.op("Relu", wide)
        elif ffn.activation == "gelu":
            # In the form that ONNX Runtime and OpenVINO recognise and fuse.
            error = self.op("Erf", self.op("Div", wide, self.weight(torch.tensor(math.sqrt(2.0)))))
            wide = self.op("Mul", wide, self.op("Add", error, self.weight(torch.tensor(1.0))))
            wide = self.op("Mul", wide, self.weight(torch.tensor(0.5)))
        else:
            inner = ffn.narrow.in_features
            gate, kept = (
                self.op("Slice", wide, self.ints([start]), self.ints([start + inner]), self.ints([2]))
                for start in (0, inner)
            )
            wide = self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), kept)
        return self.linear(ffn.narrow, wide)

    def linear(self, linear: nn.Linear, x: str, scale: float = 1.0) -> str:
        products = self.op("MatMul", x, self.weight(linear.weight.T * scale))
        return self.op("Add", products, self.weight(linear.bias * scale))

    def norm(self, norm: nn.LayerNorm, x: str, *, share: float = 1.0) -> str:
        return self.op(
            "LayerNormalization",
            x,
            self.weight(norm.weight * share),
            self.weight(norm.bias * share),
            axis=-1,
            epsilon=norm.eps,
        )

    def _places(self) -> None:
        """Places [B, 1, 1] of the newest events; how far back [B, L] each slot lies from there; and as 1 +
        events back, 0 for what lies ahead: from every slot [L, L], from the newest event [B, 1, L]."""
        length = self.op("Squeeze", self.op("Shape", "items", start=1, end=2), self.ints([0]))
        slots = self.op("Range", self.ints(0), length, self.ints(1))
        last = self.op("Sub", self.op("Cast", "lengths", to=TensorProto.INT64), self.ints(1))
        newest = self.op("Unsqueeze", self.op("Max", last, self.ints(0)), self.ints([1, 2]))
        behind = self.op("Sub", self.op("Unsqueeze", last, self.ints([1])), slots)
        every = self.op("Sub", self.op("Unsqueeze", slots, self.ints([1])), slots)
        self.shared = {
            "newest": newest,
            "back": self.op("Max", behind, self.ints(0)),
            "events back": self.op("Max", self.op("Add", every, self.ints(1)), self.ints(0)),
            "newest back": self.op(
                "Max", self.op("Add", self.op("Sub", newest, slots), self.ints(1)), self.ints(0)
            ),
        }


def _value(tensor: str, dim: int) -> onnx.ValueInfoProto:
    """An input or output of a graph: its type, and which of its sizes are free."""
    sizes: dict[str, list[str | int]] = {
        "lengths": ["users"],
        "user_vector": ["users", dim],
        "scores": ["users", "candidates"],
        "candidates": ["users", "candidates"],
        "candidate_categories": ["users", "candidates"],
    }
    kind = TensorProto.FLOAT if tensor in ("user_vector", "scores") else TensorProto.INT32
    return helper.make_tensor_value_info(tensor, kind, sizes.get(tensor, ["users", "slots"]))
