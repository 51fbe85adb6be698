"""Graphs in int8, made from checked ones. Deterministic.

`weights_in_int8` rounds matrices and tables, a scale per column or row, and leaves the arithmetic as it
is; `activations_in_int8` makes the products themselves integer ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from inference.types import Tensors

SMALLEST: Final = 512  # numbers; below it a scale and an operator cost more than they save

# Largest difference from torch in f32 of a graph with its activations in int8 (LOG.md).
INTEGER_TOLERANCE: Final = 0.6

# Which input of an operator is a weight, and along which axis its scales lie.
_WEIGHTS: Final = {("Gather", 0): 0, ("MatMul", 1): 1}


def weights_in_int8(content: bytes) -> bytes:
    """The same graph, its weights rounded to 127 steps either way: f32 constant becomes int8 constant →
    DequantizeLinear. What is small, has one dimension (norms, reaches with their -1e9) or is read in
    another way stays as it is."""
    model = onnx.ModelProto.FromString(content)
    axes: dict[str, int] = {}
    other: set[str] = set()
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            axis = _WEIGHTS.get((node.op_type, place))
            if axis is None or axes.setdefault(name, axis) != axis:
                other.add(name)
    rest: list[onnx.TensorProto] = []
    added: list[onnx.NodeProto] = []
    for tensor in model.graph.initializer:
        name = tensor.name
        wanted = name in axes and name not in other and len(tensor.dims) == 2
        if not wanted or tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < SMALLEST:
            rest.append(tensor)
            continue
        rounded, scales = _rounded(numpy_helper.to_array(tensor), axes[name])
        rest.append(numpy_helper.from_array(rounded, f"{name}.int8"))
        rest.append(numpy_helper.from_array(scales, f"{name}.scale"))
        added.append(
            helper.make_node(
                "DequantizeLinear",
                [f"{name}.int8", f"{name}.scale"],
                [name],
                name=f"widen_{name}",
                axis=axes[name],
            )
        )
    nodes = [*added, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(rest)
    model.graph.node.extend(nodes)
    return bytes(model.SerializeToString())


def _rounded(
    weights: npt.NDArray[np.float32], axis: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """int8 [n, m], and the scale of each row (axis 0) or column (axis 1); a row of zeros has scale 1."""
    largest = np.abs(weights).max(axis=1 - axis)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    divided = weights / (scales[:, None] if axis == 0 else scales)
    return np.rint(divided).astype(np.int8), scales


def activations_in_int8(content: bytes, samples: Sequence[Tensors]) -> bytes:
    """The same graph with Q/DQ pairs around its weighted matrix products, the form that TensorRT reads:
    symmetric, signed, weights by column; ranges are the largest that the samples reach."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(samples)

        def get_next(self) -> Tensors | None:
            return next(self._left, None)

    with tempfile.TemporaryDirectory(prefix="tailrace-quantise-") as folder:
        target = Path(folder) / "quantised.onnx"
        quantize_static(
            onnx.ModelProto.FromString(content),
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "MatMulConstBOnly": True,
                "QuantizeBias": False,
            },
        )
        return target.read_bytes()
