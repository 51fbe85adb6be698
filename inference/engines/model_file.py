"""A graph's file, looked at before any engine reads it.

The checksum says that these are the bytes that were published; this says that they are what our graphs
are: one self-contained file of standard operators, with the inputs and outputs of the contract and
numbers that are finite. Everything else is refused, because an engine that parses it may read other
files, run without end, or answer with NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from compression.releases.registry import Artefact, ArtefactInvalid, ModelShape
from inference.engines.base import inputs_of, outputs_of
from inference.errors import ModelUnavailable
from inference.types import Graph

MAX_BYTES: Final = 2**31 - 1  # protobuf's own bound for one message
MAX_NODES: Final = 20_000  # 64 layers, the most a manifest allows, have a tenth of this
MAX_CONSTANTS: Final = 20_000
MAX_SHAPE: Final = 2**24  # the most a constant may ask a tensor to be filled or repeated to, per axis

# What our own tools make of quantised matrices. Every engine that lacks one says so itself.
MICROSOFT: Final = frozenset({"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits"})

_STANDARD: Final = ("", "ai.onnx")
_FLOATS: Final = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
_GRAPH_ATTRIBUTES: Final = (AttributeProto.GRAPH, AttributeProto.GRAPHS)


def read_graph(artefact: Artefact, graph: Graph) -> bytes:
    """The verified and checked bytes of a graph, or `ModelUnavailable` with the reason."""
    file = artefact.manifest.graphs.get(graph)
    if file is None:
        raise ModelUnavailable(f"{artefact.version} has no {graph} graph")
    try:
        content = artefact.read(file)
    except ArtefactInvalid as error:
        raise ModelUnavailable(str(error)) from error
    # Once per version, not per engine: parsing holds the interpreter's lock for tens of milliseconds.
    if graph not in artefact.checked:
        check_graph(content, graph, artefact.manifest.model)
        artefact.checked.add(graph)
    return content


def check_graph(content: bytes, graph: Graph, shape: ModelShape) -> None:
    """Raise `ModelUnavailable` with one sentence unless the bytes are a graph of this contract."""
    model = _parsed(content, graph)
    try:
        _check_domains(model)
        _check_nodes(model)
        _check_constants(model)
        _check_contract(model, graph, shape)
        onnx.checker.check_model(content)
    except (onnx.checker.ValidationError, ValueError, TypeError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ModelUnavailable(f"the {graph} graph is refused: {reason}") from error


def _parsed(content: bytes, graph: Graph) -> onnx.ModelProto:
    if len(content) > MAX_BYTES:
        raise ModelUnavailable(f"the {graph} graph is refused: it has more than {MAX_BYTES} bytes")
    try:
        model = onnx.ModelProto.FromString(content)
    except DecodeError as error:
        raise ModelUnavailable(f"the {graph} graph is refused: it is truncated or no ONNX file") from error
    if not model.graph.node:
        raise ModelUnavailable(f"the {graph} graph is refused: it holds no operators")
    return model


def _check_domains(model: onnx.ModelProto) -> None:
    if model.functions:
        raise ValueError("it defines functions of its own")
    if model.training_info:
        raise ValueError("it carries a training graph")
    for opset in model.opset_import:
        if opset.domain not in (*_STANDARD, "com.microsoft"):
            raise ValueError(f"it uses operators of the domain {opset.domain!r}")


def _check_nodes(model: onnx.ModelProto) -> None:
    nodes = model.graph.node
    if len(nodes) > MAX_NODES:
        raise ValueError(f"it has {len(nodes)} operators, more than {MAX_NODES}")
    for node in nodes:
        if node.domain in _STANDARD:
            known = onnx.defs.has(node.op_type, "")
        else:
            known = node.domain == "com.microsoft" and node.op_type in MICROSOFT
        if not known:
            raise ValueError(f"its operator {node.op_type!r} of the domain {node.domain!r} is not allowed")
        for attribute in node.attribute:
            if attribute.type in _GRAPH_ATTRIBUTES or attribute.HasField("g") or attribute.graphs:
                raise ValueError(f"its operator {node.op_type} holds a graph of its own")


def _check_constants(model: onnx.ModelProto) -> None:
    """Every tensor in the file is whole, in the file, and finite."""
    for count, (name, tensor) in enumerate(_tensors(model)):
        if count >= MAX_CONSTANTS:
            raise ValueError(f"it has more than {MAX_CONSTANTS} constants")
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise ValueError(f"its constant {name!r} lies in another file")
        if any(size < 0 for size in tensor.dims):
            raise ValueError(f"its constant {name!r} has a negative size")
        try:
            array = numpy_helper.to_array(tensor)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"its constant {name!r} is not what its type and shape say") from error
        if tensor.data_type in _FLOATS and not _finite(array):
            raise ValueError(f"its constant {name!r} holds numbers that are not finite")
    sizes = {
        node.input[place]
        for node in model.graph.node
        for kind, place in (("ConstantOfShape", 0), ("Expand", 1), ("Tile", 1))
        if node.op_type == kind and len(node.input) > place
    }
    for tensor in model.graph.initializer:
        if tensor.name in sizes and np.any(np.abs(numpy_helper.to_array(tensor)) > MAX_SHAPE):
            raise ValueError(f"its constant {tensor.name!r} asks for a tensor of more than {MAX_SHAPE} rows")


def _tensors(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    for tensor in model.graph.initializer:
        yield tensor.name, tensor
    if model.graph.sparse_initializer:
        raise ValueError("it has sparse constants")
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise ValueError("it has sparse constants")
            if attribute.HasField("t"):
                yield node.name or node.op_type, attribute.t
            for tensor in attribute.tensors:
                yield node.name or node.op_type, tensor
            if not np.isfinite([attribute.f, *attribute.floats]).all():
                raise ValueError(f"its operator {node.op_type} is given a number that is not finite")


def _finite(array: Any) -> bool:
    """Whether all are; narrow kinds of float are not numpy's own and are widened."""
    wide = array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)
    return bool(np.isfinite(wide).all())


def _check_contract(model: onnx.ModelProto, graph: Graph, shape: ModelShape) -> None:
    for what, values, names in (
        ("inputs", model.graph.input, inputs_of(graph, shape)),
        ("outputs", model.graph.output, outputs_of(graph, shape)),
    ):
        given = [value.name for value in values]
        if sorted(given) != sorted(names):
            before = "; it was published by an earlier Tailrace: publish it anew" if "keys" in given else ""
            raise ValueError(f"its {what} are {', '.join(given) or 'none'}, not {', '.join(names)}{before}")
        for value in values:
            _check_value(value, graph, shape)


def _check_value(value: onnx.ValueInfoProto, graph: Graph, shape: ModelShape) -> None:
    """Type, rank and sizes of an input or output; 0 stands for a size that must be free."""
    states = dict.fromkeys(shape.state_names, (0, 0, shape.dim))
    states |= dict.fromkeys(shape.new_state_names, (0, 1, shape.dim))
    sizes: dict[str, tuple[int, ...]] = {"lengths": (0,), "user_vector": (0, shape.dim), **states}
    # An append brings one event.
    expected = sizes.get(value.name, (0, 1) if graph == "append" else (0, 0))
    floats = ("user_vector", *states, "scores")
    kind = TensorProto.FLOAT if value.name in floats else TensorProto.INT32
    tensor = value.type.tensor_type
    if tensor.elem_type != kind:
        given = _type_name(tensor.elem_type)
        raise ValueError(f"{value.name} is of type {given}, not {_type_name(kind)}")
    actual = tuple(size.dim_value if size.HasField("dim_value") else 0 for size in tensor.shape.dim)
    if not tensor.HasField("shape") or actual != expected:
        raise ValueError(f"{value.name} has the sizes {list(actual)}, not {list(expected)} (0: free)")


def _type_name(kind: int) -> str:
    try:
        return str(helper.tensor_dtype_to_string(kind)).removeprefix("TensorProto.")
    except KeyError:
        return str(kind)
