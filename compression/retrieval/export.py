"""A retriever as ONNX graphs; `compression.retrieval.parity` checks them against torch.

encode makes a history the user vector, score takes that and candidates, rank is both in one. Of one network
without positions encode also gives keys and values, by the contract of `compression.training.export`, and
append is one more event of such a history; where positions are counted from the newest event backwards one
event more changes every state before it, and there is no append. All networks read one table, whose rows are
their rows side by side; of the last layer only the newest event is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from compression.attention.base import HIDDEN
from compression.attention.full import written
from compression.onnx_writer import OnnxWriter
from compression.retrieval.network import FeedForward, Layer, RetrievalNetwork
from compression.retrieval.retriever import Retriever

_TABLE: Final = "items.weight"
_HISTORY: Final = ("items", "categories", "behaviors", "gaps", "lengths")
# Categories are asked for and not read, so that who asks for a list need not know which network answers.
INPUTS: Final = {
    "encode": _HISTORY,
    "score": ("user_vector", "candidates"),
    "rank": (*_HISTORY, "candidates", "candidate_categories"),
    "append": ("keys", "values", *_HISTORY),
}
OUTPUTS: Final = {
    "encode": ("user_vector", "keys", "values"),
    "score": ("scores",),
    "rank": ("scores", "user_vector"),
    "append": ("user_vector", "new_key", "new_value"),
}


def graphs_of(retriever: Retriever) -> dict[str, str]:
    """Graph name to file name."""
    return {graph: f"{graph}.onnx" for graph in INPUTS if graph != "append" or retriever.appends}


def outputs_of(graph: str, retriever: Retriever) -> tuple[str, ...]:
    """What a graph of it answers with."""
    return OUTPUTS[graph] if retriever.appends or graph != "encode" else ("user_vector",)


def export(retriever: Retriever, folder: Path) -> dict[str, str]:
    """Write the graphs, each in one file, every batch dimension dynamic; as `graphs_of`."""
    graphs = graphs_of(retriever)
    for graph, file in graphs.items():
        writer = _Writer(retriever)
        if graph in ("encode", "rank"):
            writer.encode(states=graph == "encode" and retriever.appends)
        if graph in ("score", "rank"):
            writer.score()
        if graph == "append":
            writer.append()
        (folder / file).write_bytes(writer.graph(graph).SerializeToString())
    return graphs


@dataclass(slots=True)
class _Writer(OnnxWriter):
    retriever: Retriever
    # By name: what is the same for every network and layer is written once.
    shared: dict[str, str] = field(default_factory=dict)
    # Keys and values by layer, [B, L, d] of one head, else [B, heads, L, d / heads].
    keys: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)

    def graph(self, name: str) -> onnx.ModelProto:
        model = self.model(
            name,
            [self.described(tensor, name) for tensor in INPUTS[name]],
            [self.described(tensor, name) for tensor in outputs_of(name, self.retriever)],
        )
        onnx.checker.check_model(model, full_check=True)
        return model

    def described(self, tensor: str, graph: str) -> onnx.ValueInfoProto:
        """An input or output of a graph: its type, and which of its sizes are free."""
        config = self.retriever.members[0].config
        states: list[str | int] = ["users", config.layers, config.heads, "slots", config.dim // config.heads]
        sizes: dict[str, list[str | int]] = {
            "lengths": ["users"],
            "user_vector": ["users", self.retriever.dim],
            "keys": states,
            "values": states,
            "new_key": [*states[:3], 1, states[4]],
            "new_value": [*states[:3], 1, states[4]],
            "scores": ["users", "candidates"],
            "candidates": ["users", "candidates"],
            "candidate_categories": ["users", "candidates"],
        }
        floats = ("user_vector", "keys", "values", "new_key", "new_value", "scores")
        kind = TensorProto.FLOAT if tensor in floats else TensorProto.INT32
        rows: list[str | int] = ["users", 1 if graph == "append" else "slots"]
        return helper.make_tensor_value_info(tensor, kind, sizes.get(tensor, rows))

    def encode(self, *, states: bool) -> None:
        """History tensors to user_vector, and where they are asked for to the `states`: keys and values."""
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
        if states:
            self.stack(self.keys, output="keys")
            self.stack(self.values, output="values")

    def append(self) -> None:
        """Keys, values and one more event to user_vector and that event's key and value.

        The event attends to itself beside the history, not within it: nothing is copied to make room."""
        network = self.retriever.members[0]
        x = self.tokens(network, self.op("Gather", self.weight(self.retriever.item_table(), _TABLE), "items"))
        slots = self.op("Range", self.ints(0), self.size("keys", 3), self.ints(1))
        before = self.op("Unsqueeze", self.op("Cast", "lengths", to=TensorProto.INT64), self.ints([1, 2]))
        self.shared["back from it"] = self.op("Max", self.op("Sub", before, slots), self.ints(0))
        for number, layer in enumerate(cast(list[Layer], list(network.layers))):
            x = self.appended(layer, number, x, network.config.max_history)
        self.norm(network.final_norm, self.op("Squeeze", x, self.ints([1])), output="user_vector")
        self.stack(self.keys, output="new_key")
        self.stack(self.values, output="new_value")

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
            (network.positions, self.shared.get("back", "")),
            (network.behaviors, "behaviors"),
            (network.gaps, "gaps"),
        ):
            if table is not None:
                x = self.op("Add", x, self.op("Gather", self.weight(table.weight), places))
        return x

    def layer(self, layer: Layer, x: str, slots: int, *, newest: bool) -> str:
        """`Layer.forward` in evaluation; of the `newest` event alone, [B, 1, d], where no more is read."""
        heads = written(layer.attention).heads
        normed = self.norm(layer.attention_norm, x)
        key, value = self.keys_values(layer, normed)
        if newest:
            x, normed = (self.op("GatherND", one, self.shared["newest"], batch_dims=1) for one in (x, normed))
        table = torch.cat([torch.full((heads, 1), HIDDEN), _reach(layer, slots)], 1)
        bias = self.bias(table, self.shared["newest back" if newest else "events back"], of_users=newest)
        logits = self.op("Add", self.op("MatMul", self.query(layer, normed), self.turned(key, heads)), bias)
        return self.onward(layer, x, self.op("MatMul", self.op("Softmax", logits, axis=-1), value))

    def appended(self, layer: Layer, number: int, x: str, slots: int) -> str:
        """`Layer.appended`, [B, 1, d]."""
        heads = written(layer.attention).heads
        normed = self.norm(layer.attention_norm, x)
        own_key, own_value = self.keys_values(layer, normed)
        key, value = (self.op("Gather", states, self.ints(number), axis=1) for states in ("keys", "values"))
        if heads == 1:
            key, value = (self.op("Squeeze", states, self.ints([1])) for states in (key, value))
        query, reach = self.query(layer, normed), _reach(layer, slots)
        own = self.op("ReduceSum", self.op("Mul", query, own_key), self.ints([-1]), keepdims=1)
        own = self.op("Add", own, self.weight(reach[:, :1] if heads == 1 else reach[:, :1, None]))
        table = torch.cat([torch.full((heads, 1), HIDDEN), reach[:, 1:]], 1)
        bias = self.bias(table, self.shared["back from it"], of_users=True)
        logits = self.op("Add", self.op("MatMul", query, self.turned(key, heads)), bias)
        weights = self.op("Softmax", self.op("Concat", logits, own, axis=-1), axis=-1)
        old = self.op("Slice", weights, self.ints([0]), self.ints([-1]), self.ints([-1]))
        new = self.op("Slice", weights, self.ints([-1]), self.ints([2**62]), self.ints([-1]))
        found = self.op("Add", self.op("MatMul", old, value), self.op("Mul", new, own_value))
        return self.onward(layer, x, found)

    def keys_values(self, layer: Layer, normed: str) -> tuple[str, str]:
        """Of the events; they are listed, too."""
        attention = written(layer.attention)
        key = self.heads(self.linear(attention.key, normed), attention.heads)
        value = self.heads(self.linear(attention.value, normed), attention.heads)
        self.keys.append(key)
        self.values.append(value)
        return key, value

    def query(self, layer: Layer, normed: str) -> str:
        """Scaled for the dot product with keys."""
        attention = written(layer.attention)
        scale = (attention.out.in_features // attention.heads) ** -0.5
        return self.heads(self.linear(attention.query, normed, scale), attention.heads)

    def turned(self, key: str, heads: int) -> str:
        return self.op("Transpose", key, perm=[0, 2, 1] if heads == 1 else [0, 1, 3, 2])

    def onward(self, layer: Layer, x: str, found: str) -> str:
        """From what attention found to the end of the layer."""
        attention = written(layer.attention)
        if attention.heads > 1:
            found = self.op("Transpose", found, perm=[0, 2, 1, 3])
            found = self.op("Reshape", found, self.ints([0, 0, attention.out.in_features]))
        x = self.op("Add", x, self.linear(attention.out, found))
        return self.op("Add", x, self.feed_forward(layer.ffn, self.norm(layer.ffn_norm, x)))

    def bias(self, table: Tensor, places: str, *, of_users: bool) -> str:
        """What is added to the logits, from a table [heads, places] by places [L, L], or `of_users`
        [B, 1, L]: [L, L] or [heads, L, L], and of users [B, 1, L] or [B, heads, 1, L]."""
        if len(table) == 1:
            return self.op("Gather", self.weight(table[0]), places)
        perm = [0, 3, 1, 2] if of_users else [2, 0, 1]
        return self.op("Transpose", self.op("Gather", self.weight(table.T), places), perm=perm)

    def stack(self, layers: list[str], *, output: str) -> None:
        """Keys or values of all layers as [B, layers, heads, L, d / heads]."""
        one_head = self.retriever.members[0].config.heads == 1
        axes = self.ints([1, 2] if one_head else [1])
        self.op("Concat", *(self.op("Unsqueeze", layer, axes) for layer in layers), axis=1, output=output)

    def size(self, tensor: str, axis: int) -> str:
        return self.op("Squeeze", self.op("Shape", tensor, start=axis, end=axis + 1), self.ints([0]))

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

    def norm(self, norm: nn.LayerNorm, x: str, *, share: float = 1.0, output: str = "") -> str:
        return self.op(
            "LayerNormalization",
            x,
            self.weight(norm.weight * share),
            self.weight(norm.bias * share),
            output=output,
            axis=-1,
            epsilon=norm.eps,
        )

    def _places(self) -> None:
        """Places [B, 1, 1] of the newest events; how far back [B, L] each slot lies from there; and as 1 +
        events back, 0 for what lies ahead: from every slot [L, L], from the newest event [B, 1, L]."""
        slots = self.op("Range", self.ints(0), self.size("items", 1), self.ints(1))
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


def _reach(layer: Layer, slots: int) -> Tensor:
    """[heads, slots]: what is added to a logit by how many events back a slot lies."""
    if layer.reach is None:
        return torch.zeros(written(layer.attention).heads, slots)
    return layer.reach.detach()
