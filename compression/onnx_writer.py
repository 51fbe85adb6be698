"""ONNX graphs operator by operator: what is common to every network that is written out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

OPSET: Final = 18
IR_VERSION: Final = 8  # of opset 18, so that older runtimes read it


def by_lag(reach: Tensor, hidden: float, *, places: int, shift: int = 0) -> Tensor:
    """[places, heads, slots], from reach [heads, slots] by how many slots back: place p has for slot s what
    lies p - s + shift back, and `hidden` where that is ahead of it. As large as one history's logits."""
    slots = reach.shape[1]
    back = torch.arange(places)[:, None] - torch.arange(slots) + shift
    found = reach[:, back.clamp(min=0)].masked_fill(back < 0, hidden)
    return found.transpose(0, 1).contiguous()


@dataclass(slots=True)
class OnnxWriter:
    """Operators and constants in the making. Methods take and return names of tensors."""

    nodes: list[onnx.NodeProto] = field(default_factory=list, init=False)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict, init=False)

    def model(
        self, name: str, inputs: Iterable[onnx.ValueInfoProto], outputs: Iterable[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        """All that was written, as a graph of that name; not checked yet."""
        graph = helper.make_graph(
            self.nodes, name, list(inputs), list(outputs), list(self.constants.values())
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="tailrace",
        )

    def op(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """One operator with one output."""
        return self.ops(kind, [output or f"{kind}_{len(self.nodes)}"], *inputs, **attributes)[0]

    def ops(self, kind: str, outputs: list[str], *inputs: str, **attributes: Any) -> list[str]:
        """One operator; the names of its outputs."""
        self.nodes.append(
            helper.make_node(kind, list(inputs), outputs, name=f"make_{outputs[0]}", **attributes)
        )
        return outputs

    def weight(self, tensor: Tensor, name: str = "") -> str:
        return self.constant(tensor.detach().float().cpu().numpy(), name)

    def added(self, table: Tensor, places: str, size: str) -> str:
        """What is added to the logits of users who ask at places [B] for the first `size` slots: rows of a
        table (`by_lag`), as single numbers take longer to look up than to multiply. [B, 1, L], of more than
        one head [B, heads, 1, L]."""
        heads = table.shape[1]
        rows = self.op("Gather", self.weight(table if heads == 1 else table[:, :, None]), places)
        last = self.ints([2 if heads == 1 else 3])
        return self.op("Slice", rows, self.ints([0]), size, last)

    def added_to_all(self, table: Tensor, size: str) -> str:
        """The same where each of the first `size` places asks: [L, L], of more than one
        head [heads, L, L]."""
        heads = table.shape[1]
        table = table[:, 0] if heads == 1 else table.transpose(0, 1)
        ends = self.op("Concat", size, size, axis=0)
        axes = self.ints([0, 1] if heads == 1 else [1, 2])
        return self.op("Slice", self.weight(table), self.ints([0, 0]), ends, axes)

    def ints(self, value: int | list[int]) -> str:
        return self.constant(np.array(value, np.int64))

    def constant(self, array: npt.NDArray[Any], name: str = "") -> str:
        """What has a name is written once."""
        name = name or f"constant_{len(self.constants)}"
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.array(array, order="C"), name)
        return name
