"""`CandidateRanker` as an ONNX graph for one user with a full history: items and candidates to scores.

Two forms with the same inputs and outputs: every candidate with its own copy of the history, as formula
(2) counts, or all after one copy. In both only those states of the last layer are computed that are read.
Linear maps and tables are written in full precision or, where a grid is named, as the codes of
`compression.smaller.quantization`: then activations are quantized to 8 bits as they come, products are
of integers (MatMulInteger), and rows of a table become floats after they were looked up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, cast

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from compression.attention.full import written
from compression.onnx_writer import OnnxWriter
from compression.ranking.network import CandidateRanker, packed_bias
from compression.retrieval.network import Layer
from compression.smaller.product_codes import ProductTable
from compression.smaller.quantization import Grid, quantize

Form = Literal["per candidate", "shared history"]
FORMS: Final[tuple[Form, ...]] = ("per candidate", "shared history")


def graph(
    ranker: CandidateRanker,
    form: Form,
    *,
    events: int,
    candidates: int,
    grids: Mapping[str, Grid] | None = None,
) -> onnx.ModelProto:
    """Inputs `items` int32 [events] and `candidates` int32 [candidates], output `scores` f32 [candidates].
    `grids` by module name; the network has ReLU and positions."""
    if ranker.network.config.activation != "relu" or ranker.network.positions is None:
        raise ValueError("only networks with ReLU and positions are written")
    writer = _Writer(ranker, form, events, candidates, dict(grids or {}))
    writer.write()
    made = writer.model(
        "rank",
        [
            helper.make_tensor_value_info("items", TensorProto.INT32, [events]),
            helper.make_tensor_value_info("candidates", TensorProto.INT32, [candidates]),
        ],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [candidates])],
    )
    onnx.checker.check_model(made)
    return made


@dataclass(slots=True)
class _Writer(OnnxWriter):
    ranker: CandidateRanker
    form: Form
    events: int
    candidates: int
    grids: dict[str, Grid]

    def write(self) -> None:
        ranker, network = self.ranker, self.ranker.network
        copies, after = (self.candidates, 1) if self.form == "per candidate" else (1, self.candidates)
        history = self.op("Expand", self.op("Unsqueeze", "items", self.ints([0])), self.ints([copies, 1]))
        asked = self.op("Reshape", "candidates", self.ints([copies, after]))
        rows = self.rows("network.items", self.op("Concat", history, asked, axis=1))
        assert network.positions is not None  # a ranker's network has them
        back = torch.arange(self.events - 1, -1, -1)
        places = torch.cat([network.positions.weight[back], ranker.mark.expand(after, -1)])
        scale = self.weight(torch.tensor(network.config.dim**0.5))
        x = self.op("Add", self.op("Mul", rows, scale), self.weight(places))
        seen = torch.full((1, after), self.events)
        layers = ranker.layers
        for number, layer in enumerate(layers):
            bias = packed_bias(self.events, layer.reach, seen)[0]
            x = self.layer(f"network.layers.{number}", layer, x, bias, last=number == len(layers) - 1)
        states = self.norm(network.final_norm, x)  # the newest event, then candidates
        user = self.op("Slice", states, self.ints([0]), self.ints([1]), self.ints([1]))
        states = self.op("Slice", states, self.ints([1]), self.ints([2**62]), self.ints([1]))
        vectors = self.op("Slice", rows, self.ints([self.events]), self.ints([2**62]), self.ints([1]))
        learned = self.op("MatMul", states, self.weight(ranker.readout.weight.T))
        fit = self.op("MatMul", vectors, self.op("Transpose", user, perm=[0, 2, 1]))
        scores = self.op("Add", learned, self.op("Mul", fit, self.weight(ranker.fit)))
        self.op("Reshape", scores, self.ints([self.candidates]), output="scores")

    def layer(self, name: str, layer: Layer, x: str, bias: Tensor, *, last: bool) -> str:
        attention = written(layer.attention)
        normed = self.norm(layer.attention_norm, x)
        asking = normed
        if last:
            bias = bias[:, self.events - 1 :]
            x, asking = (
                self.op("Slice", one, self.ints([self.events - 1]), self.ints([2**62]), self.ints([1]))
                for one in (x, normed)
            )
        heads = attention.heads
        query, key, value = (
            self.heads(
                self.maps(f"{name}.attention.{part}", getattr(attention, part), given, scale), heads, perm
            )
            for part, given, scale, perm in (
                ("query", asking, (attention.out.in_features // heads) ** -0.5, [0, 2, 1, 3]),
                ("key", normed, 1.0, [0, 2, 3, 1]),
                ("value", normed, 1.0, [0, 2, 1, 3]),
            )
        )
        logits = self.op("Add", self.op("MatMul", query, key), self.weight(bias))
        found = self.op("MatMul", self.op("Softmax", logits, axis=-1), value)
        found = self.op("Transpose", found, perm=[0, 2, 1, 3])
        found = self.op("Reshape", found, self.ints([0, 0, attention.out.in_features]))
        x = self.op("Add", x, self.linear(f"{name}.attention.out", attention.out, found))
        wide = self.op(
            "Relu", self.linear(f"{name}.ffn.widen", layer.ffn.widen, self.norm(layer.ffn_norm, x))
        )
        return self.op("Add", x, self.linear(f"{name}.ffn.narrow", layer.ffn.narrow, wide))

    def heads(self, x: str, heads: int, perm: list[int]) -> str:
        """[B, T, H w] to [B, H, T, w], or as `perm` says."""
        return self.op("Transpose", self.op("Reshape", x, self.ints([0, 0, heads, -1])), perm=perm)

    def maps(self, name: str, mapped: nn.Linear | nn.Sequential, x: str, scale: float) -> str:
        """A linear map, or one of low rank, which is a sequence of two."""
        if isinstance(mapped, nn.Linear):
            return self.linear(name, mapped, x, scale)
        down, up = cast(list[nn.Linear], list(mapped))
        return self.linear(f"{name}.1", up, self.linear(f"{name}.0", down, x), scale)

    def linear(self, name: str, linear: nn.Linear, x: str, scale: float = 1.0) -> str:
        products = self.products(name, linear, x, scale)
        if linear.bias is None:
            return products
        return self.op("Add", products, self.weight(linear.bias * scale))

    def products(self, name: str, linear: nn.Linear, x: str, scale: float) -> str:
        grid = self.grids.get(name)
        if grid is None:
            return self.op("MatMul", x, self.weight(linear.weight.T * scale))
        made = quantize(linear.weight, grid)
        if bool(((made.low > 0) | (made.low < -255)).any()):
            # Zero lies outside a row's codes (all its few weights have one sign): no zero point says that.
            return self.op("MatMul", x, self.weight(made.values().T * scale))
        counted = (made.codes - made.low).numpy().astype(np.uint8)
        zero = (-made.low).clamp(0, 255).numpy().astype(np.uint8).reshape(-1)
        names = [f"DynamicQuantizeLinear_{len(self.nodes)}_{number}" for number in range(3)]
        whole, step, point = self.ops("DynamicQuantizeLinear", names, x)
        products = self.op(
            "MatMulInteger",
            whole,
            self.constant(counted.T),
            point,
            self.constant(zero if grid.per_row else zero[0]),
        )
        steps = self.op("Mul", step, self.weight(made.step.reshape(-1) * scale))
        return self.op("Mul", self.op("Cast", products, to=TensorProto.FLOAT), steps)

    def rows(self, name: str, places: str) -> str:
        """Rows of a table, [..., d]."""
        table = self.ranker.get_submodule(name)
        if isinstance(table, ProductTable):
            return self.coded_rows(table, places)
        assert isinstance(table, nn.Embedding)
        grid = self.grids.get(name)
        if grid is None:
            return self.op("Gather", self.weight(table.weight), places)
        made = quantize(table.weight, grid)
        # Codes count from an even lower one than `low`, so that they fit 8 bits with a sign.
        middle = (made.low + made.high + 1) // 2
        codes = self.op(
            "Cast",
            self.op("Gather", self.constant((made.codes - middle).numpy().astype(np.int8)), places),
            to=TensorProto.FLOAT,
        )
        offset = self.op("Gather", self.weight(middle.float() * made.step), places)
        return self.op(
            "Add", self.op("Mul", codes, self.op("Gather", self.weight(made.step), places)), offset
        )

    def coded_rows(self, table: ProductTable, places: str) -> str:
        """Rows [B, T, d] of a table of product codes, none of them padding: one lookup of all codes, one
        of all pieces."""
        splits, pieces, width = table.pieces.shape
        codes = self.op("Gather", self.constant(table.codes.numpy()), places)
        first = self.constant(np.arange(0, splits * pieces, pieces, dtype=np.int32))
        which = self.op("Add", self.op("Cast", codes, to=TensorProto.INT32), first)
        found = self.op("Gather", self.weight(table.pieces.reshape(-1, width)), which)
        return self.op("Reshape", found, self.ints([0, 0, splits * width]))

    def norm(self, norm: nn.LayerNorm, x: str) -> str:
        return self.op(
            "LayerNormalization",
            x,
            self.weight(norm.weight),
            self.weight(norm.bias),
            axis=-1,
            epsilon=norm.eps,
        )
