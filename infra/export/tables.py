"""The tables of a graph made smaller: fewer rows, and narrower numbers in them.

Only what is read row by row is touched, so the arithmetic stays f32. A narrow row is widened after it has
been gathered, never the whole table: that would cost its full size in memory, wherever the graph runs.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from inference.engines.quantise import SMALLEST

ITEMS: Final = "items.weight"

# How the numbers of a row are kept: int8 and int16 are steps of the row's own scale. f16 takes as much as
# int16 and is eight times as far from f32 (compression/LOG.md).
Numbers = Literal["int8", "int16", "f32"]
_STEPS: Final[dict[Numbers, tuple[type[np.signedinteger[Any]], int]]] = {
    "int8": (np.int8, 127),
    "int16": (np.int16, 32_767),
}

Int64 = npt.NDArray[np.int64]


def keep_rows(content: bytes, rows: Int64) -> bytes:
    """The same graph with these rows of the item table only, in this order."""
    model = onnx.ModelProto.FromString(content)
    # In 8 bits, as a version may have been published, the table is codes and their steps.
    names = (ITEMS, f"{ITEMS}.codes", f"{ITEMS}.step")
    found = [tensor for tensor in model.graph.initializer if tensor.name in names]
    for tensor in found:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[rows], tensor.name))
    if not found:
        raise ValueError(f"the graph has no table {ITEMS}")
    return bytes(model.SerializeToString())


def narrow(content: bytes, numbers: Numbers) -> bytes:
    """The same graph, every table that rows are gathered from kept in these numbers."""
    if numbers == "f32":
        return content
    model = onnx.ModelProto.FromString(content)
    read = {place for node in model.graph.node if node.op_type == "Gather" for place in node.input[:1]}
    constants: list[onnx.TensorProto] = []
    tables: set[str] = set()
    for tensor in model.graph.initializer:
        wanted = tensor.name in read and len(tensor.dims) == 2 and tensor.data_type == TensorProto.FLOAT
        if wanted and tensor.dims[1] > 1 and np.prod(tensor.dims) >= SMALLEST:
            tables.add(tensor.name)
            constants += _narrowed(tensor, numbers)
        else:
            constants.append(tensor)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        gathers = node.op_type == "Gather" and node.input[0] in tables
        nodes += _widened(node, numbers) if gathers else [node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(constants)
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def _narrowed(tensor: onnx.TensorProto, numbers: Numbers) -> list[onnx.TensorProto]:
    table, name = numpy_helper.to_array(tensor), tensor.name
    kind, steps = _STEPS[numbers]
    largest = np.abs(table).max(axis=1, keepdims=True)
    scales = np.where(largest > 0, largest / steps, 1).astype(np.float32)
    rounded = np.rint(table / scales).astype(kind)
    return [
        numpy_helper.from_array(rounded, f"{name}.{numbers}"),
        numpy_helper.from_array(scales, f"{name}.scale"),
    ]


def _widened(node: onnx.NodeProto, numbers: Numbers) -> list[onnx.NodeProto]:
    table, rows, output = node.input[0], node.input[1], node.output[0]
    kept = f"{output}_{numbers}"
    gather = helper.make_node("Gather", [f"{table}.{numbers}", rows], [kept], name=f"gather_{kept}")
    wide, scale = f"{output}_wide", f"{output}_scale"
    return [
        gather,
        helper.make_node("Cast", [kept], [wide], name=f"make_{wide}", to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"{table}.scale", rows], [scale], name=f"make_{scale}"),
        helper.make_node("Mul", [wide, scale], [output], name=node.name),
    ]
