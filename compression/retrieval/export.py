"""A retriever as ONNX graphs; `compression.retrieval.parity` checks them against torch.

encode makes a history the user vector, score takes that and candidates, rank is both in one. Of one network
without positions encode also gives states, and append is one more event of such a history; where positions
are counted from the newest event backwards one event more changes every state before it, and there is no
append. All networks read one table, whose rows are their rows side by side; of the last layer only the newest
event is computed.

A state is what a layer's keys and values are made of. Who asks brings the projection of keys along, as
(W_q x)·(W_k s) = (W_k^T W_q x)·s, and what is found is projected once it is summed, as the weights of a sum
make one (the "absorbed" projections of DeepSeek-V2, arXiv 2405.04434, 2.1.2). So half as much is kept and
read, and of the events before the newest the last layer computes nothing but its norm. Of several heads,
where every event asks, keys and values are the shorter way.
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
from compression.onnx_writer import OnnxWriter, by_lag
from compression.releases.registry import of_new_event, states_by_layer
from compression.retrieval.network import FeedForward, Layer, RetrievalNetwork
from compression.retrieval.retriever import Retriever

_TABLE: Final = "items.weight"
_SCORED: Final = "scored.weight"
_HISTORY: Final = ("items", "categories", "behaviors", "gaps", "lengths")
# Categories are asked for and not read, so that who asks for a list need not know which network answers.
INPUTS: Final = {
    "encode": _HISTORY,
    "score": ("user_vector", "candidates"),
    "rank": (*_HISTORY, "candidates", "candidate_categories"),
    "append": _HISTORY,
}
OUTPUTS: Final = {
    "encode": ("user_vector",),
    "score": ("scores",),
    "rank": ("scores", "user_vector"),
    "append": ("user_vector",),
}


def graphs_of(retriever: Retriever) -> dict[str, str]:
    """Graph name to file name."""
    return {graph: f"{graph}.onnx" for graph in INPUTS if graph != "append" or retriever.appends}


def state_names(retriever: Retriever) -> tuple[str, ...]:
    """As `ModelShape` has them."""
    if not retriever.appends:
        return ()
    return states_by_layer(retriever.members[0].config.layers, "state")


def inputs_of(graph: str, retriever: Retriever) -> tuple[str, ...]:
    """What a graph of it reads."""
    return (*(state_names(retriever) if graph == "append" else ()), *INPUTS[graph])


def outputs_of(graph: str, retriever: Retriever) -> tuple[str, ...]:
    """What a graph of it answers with."""
    given = {"encode": state_names(retriever), "append": of_new_event(state_names(retriever))}
    return (*OUTPUTS[graph], *given.get(graph, ()))


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
    # What states are called by layer, where they are asked for.
    names: tuple[str, ...] = ()

    def graph(self, name: str) -> onnx.ModelProto:
        model = self.model(
            name,
            [self.described(tensor, name) for tensor in inputs_of(name, self.retriever)],
            [self.described(tensor, name) for tensor in outputs_of(name, self.retriever)],
        )
        onnx.checker.check_model(model, full_check=True)
        return model

    def described(self, tensor: str, graph: str) -> onnx.ValueInfoProto:
        """An input or output of a graph: its type, and which of its sizes are free."""
        dim = self.retriever.dim
        names = state_names(self.retriever)
        states: dict[str, list[str | int]] = {name: ["users", "slots", dim] for name in names}
        states |= {name: ["users", 1, dim] for name in of_new_event(names)}
        sizes: dict[str, list[str | int]] = {
            "lengths": ["users"],
            "user_vector": ["users", dim],
            **states,
            "scores": ["users", "candidates"],
            "candidates": ["users", "candidates"],
            "candidate_categories": ["users", "candidates"],
        }
        floats = ("user_vector", *states, "scores")
        kind = TensorProto.FLOAT if tensor in floats else TensorProto.INT32
        rows: list[str | int] = ["users", 1 if graph == "append" else "slots"]
        return helper.make_tensor_value_info(tensor, kind, sizes.get(tensor, rows))

    def encode(self, *, states: bool) -> None:
        """History tensors to user_vector, and to the `states` where they are asked for."""
        self.names = state_names(self.retriever) if states else ()
        rows = self.op("Gather", self.weight(self.retriever.event_table(), _TABLE), "items")
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

    def append(self) -> None:
        """States and one more event to user_vector and that event's states.

        The event attends to itself beside the history, not within it: nothing is copied to make room."""
        network, states = self.retriever.members[0], state_names(self.retriever)
        x = self.op("Gather", self.weight(self.retriever.event_table(), _TABLE), "items")
        x, size = self.tokens(network, x), self.size(states[0], 1)
        for state, layer in zip(states, cast(list[Layer], list(network.layers)), strict=True):
            x = self.appended(layer, state, x, size, network.config.max_history)
        self.vector(network, self.op("Squeeze", x, self.ints([1])), output="user_vector")

    def score(self) -> None:
        """Candidates and user_vector to scores."""
        categories = any(network.categories is not None for network in self.retriever.members)
        table = self.weight(self.retriever.item_table(), _SCORED if categories else _TABLE)
        rows = self.op("Gather", table, "candidates")
        scores = self.op("MatMul", rows, self.op("Unsqueeze", "user_vector", self.ints([2])))
        self.op("Squeeze", scores, self.ints([2]), output="scores")

    def user_vector(self, network: RetrievalNetwork, rows: str) -> str:
        """`Retriever.user_vectors`' part of one network, [B, d], from its rows [B, L, d]."""
        x = self.tokens(network, rows)
        layers = cast(list[Layer], list(network.layers))
        names = self.names or ("",) * len(layers)
        for layer, name in zip(layers[:-1], names, strict=False):
            x = self.layer(layer, x, name, network.config.max_history)
        x = self.newest(layers[-1], x, names[-1], network.config.max_history)
        x = self.op("Squeeze", x, self.ints([1]))
        return self.vector(network, x, share=1 / len(self.retriever.networks))

    def vector(self, network: RetrievalNetwork, newest: str, *, share: float = 1.0, output: str = "") -> str:
        """From the last layer's states [B, d] at the newest events to their share of user vectors."""
        if network.lateness is not None:
            newest = self.op("Add", newest, self.weight(network.lateness.weight[0]))
        return self.norm(network.final_norm, newest, share=share, output=output)

    def tokens(self, network: RetrievalNetwork, rows: str) -> str:
        """`RetrievalNetwork.tokens`."""
        x = rows
        if network.categories is not None:
            x = self.op("Add", x, self.op("Gather", self.weight(network.categories.weight), "categories"))
        x = self.op("Mul", x, self.weight(torch.tensor(math.sqrt(network.config.dim))))
        for table, places in (
            (network.positions, self.shared.get("back", "")),
            (network.behaviors, "behaviors"),
            (network.gaps, "gaps"),
        ):
            if table is not None:
                x = self.op("Add", x, self.op("Gather", self.weight(table.weight), places))
        return x

    def layer(self, layer: Layer, x: str, name: str, slots: int) -> str:
        """`Layer.forward` in evaluation; its state goes by a name where that is one."""
        attention = written(layer.attention)
        normed = self.norm(layer.attention_norm, x, output=name)
        bias = self.added_to_all(by_lag(_reach(layer, slots), HIDDEN, places=slots), self.shared["slots"])
        if attention.heads == 1:
            return self.onward(layer, x, self.found(layer, normed, normed, bias))
        scale = (attention.out.in_features // attention.heads) ** -0.5
        query, key, value = (
            self.heads(self.linear(linear, normed, times), attention.heads)
            for linear, times in ((attention.query, scale), (attention.key, 1.0), (attention.value, 1.0))
        )
        logits = self.op("MatMul", query, self.op("Transpose", key, perm=[0, 1, 3, 2]))
        found = self.op("MatMul", self.op("Softmax", self.op("Add", logits, bias), axis=-1), value)
        return self.onward(layer, x, self.linear(attention.out, self.together(found, attention.heads)))

    def newest(self, layer: Layer, x: str, name: str, slots: int) -> str:
        """The same of the newest event alone, [B, 1, d]."""
        states = self.norm(layer.attention_norm, x, output=name)
        x, normed = (self.op("GatherND", one, self.shared["place"], batch_dims=1) for one in (x, states))
        table = by_lag(_reach(layer, slots), HIDDEN, places=slots)
        bias = self.added(table, self.shared["newest"], self.shared["slots"])
        return self.onward(layer, x, self.found(layer, normed, states, bias))

    def appended(self, layer: Layer, name: str, x: str, size: str, slots: int) -> str:
        """`Layer.appended`, [B, 1, d]."""
        normed = self.norm(layer.attention_norm, x, output=f"new_{name}")
        reach = _reach(layer, slots)
        table = by_lag(reach.index_fill(1, torch.tensor([0]), HIDDEN), HIDDEN, places=slots)
        query, states = self.query(layer, normed), self.of_heads(layer, name)
        own_state = self.of_heads(layer, normed)
        own = self.op("MatMul", query, self.turned(layer, own_state))
        own = self.op("Add", own, self.weight(reach[:, :1] if len(reach) == 1 else reach[:, :1, None]))
        logits = self.op("MatMul", query, self.turned(layer, states))
        logits = self.op("Add", logits, self.added(table, "lengths", size))
        weights = self.op("Softmax", self.op("Concat", logits, own, axis=-1), axis=-1)
        old = self.op("Slice", weights, self.ints([0]), self.ints([-1]), self.ints([-1]))
        new = self.op("Slice", weights, self.ints([-1]), self.ints([2**62]), self.ints([-1]))
        found = self.op("Add", self.op("MatMul", old, states), self.op("Mul", new, own_state))
        return self.onward(layer, x, self.projected(layer, found))

    def found(self, layer: Layer, normed: str, states: str, bias: str) -> str:
        """What events [B, T, d] find among states [B, L, d], projected."""
        states = self.of_heads(layer, states)
        logits = self.op("MatMul", self.query(layer, normed), self.turned(layer, states))
        weights = self.op("Softmax", self.op("Add", logits, bias), axis=-1)
        return self.projected(layer, self.op("MatMul", weights, states))

    def query(self, layer: Layer, normed: str) -> str:
        """For the dot product with states, [B, T, d], of more heads [B, heads, T, d]. What the bias of keys
        adds is the same for all of them and changes no softmax."""
        attention = written(layer.attention)
        heads = attention.heads
        query, key = (_by_head(one.weight, heads) for one in (attention.query, attention.key))
        scale = query.shape[1] ** -0.5
        weight = torch.einsum("hwd,hwe->hde", query, key) * scale  # [heads, from, to]
        bias = torch.einsum("hw,hwe->he", attention.query.bias.view(heads, -1), key) * scale
        products = self.op("MatMul", normed, self.weight(weight.transpose(0, 1).flatten(1)))
        return self.heads(self.op("Add", products, self.weight(bias.flatten())), heads)

    def projected(self, layer: Layer, found: str) -> str:
        """Sums of states as `query` has its heads, [B, T, d] as the layer adds them to its events."""
        attention = written(layer.attention)
        value, out = attention.value, attention.out
        by_head = out.weight.T.view(attention.heads, -1, out.out_features)
        weight = torch.einsum("hwd,hwo->hdo", _by_head(value.weight, attention.heads), by_head)
        bias = out.weight @ value.bias + out.bias
        products = self.op("MatMul", self.together(found, attention.heads), self.weight(weight.flatten(0, 1)))
        return self.op("Add", products, self.weight(bias))

    def of_heads(self, layer: Layer, states: str) -> str:
        """[B, L, d] as it is for one head, for all of more [B, 1, L, d]."""
        return states if written(layer.attention).heads == 1 else self.op("Unsqueeze", states, self.ints([1]))

    def turned(self, layer: Layer, states: str) -> str:
        perm = [0, 2, 1] if written(layer.attention).heads == 1 else [0, 1, 3, 2]
        return self.op("Transpose", states, perm=perm)

    def onward(self, layer: Layer, x: str, found: str) -> str:
        """From what attention found to the end of the layer."""
        x = self.op("Add", x, found)
        return self.op("Add", x, self.feed_forward(layer.ffn, self.norm(layer.ffn_norm, x)))

    def size(self, tensor: str, axis: int) -> str:
        """[1]."""
        return self.op("Shape", tensor, start=axis, end=axis + 1)

    def heads(self, x: str, heads: int) -> str:
        """[B, T, heads x w] to [B, heads, T, w]; of one head as it is."""
        if heads == 1:
            return x
        return self.op("Transpose", self.op("Reshape", x, self.ints([0, 0, heads, -1])), perm=[0, 2, 1, 3])

    def together(self, x: str, heads: int) -> str:
        """[B, heads, T, w] to [B, T, heads x w]; of one head as it is."""
        if heads == 1:
            return x
        return self.op("Reshape", self.op("Transpose", x, perm=[0, 2, 1, 3]), self.ints([0, 0, -1]))

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
        """How many slots there are [1]; the places [B], and [B, 1, 1], of the newest events; how far back
        [B, L] each slot lies from there."""
        size = self.size("items", 1)
        slots = self.op("Range", self.ints(0), self.op("Squeeze", size, self.ints([0])), self.ints(1))
        last = self.op("Sub", self.op("Cast", "lengths", to=TensorProto.INT64), self.ints(1))
        newest = self.op("Max", last, self.ints(0))
        behind = self.op("Sub", self.op("Unsqueeze", last, self.ints([1])), slots)
        self.shared = {
            "slots": size,
            "newest": newest,
            "place": self.op("Unsqueeze", newest, self.ints([1, 2])),
            "back": self.op("Max", behind, self.ints(0)),
        }


def _by_head(weight: Tensor, heads: int) -> Tensor:
    """A projection's weights [heads x w, d] as [heads, w, d]."""
    return weight.view(heads, -1, weight.shape[1])


def _reach(layer: Layer, slots: int) -> Tensor:
    """[heads, slots]: what is added to a logit by how many events back a slot lies."""
    if layer.reach is None:
        return torch.zeros(written(layer.attention).heads, slots)
    return layer.reach.detach()
