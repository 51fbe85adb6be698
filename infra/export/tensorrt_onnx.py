"""ONNX that TensorRT builds its plans from: types and ranges are in the graph, none is left to the builder.

A plan fits one GPU and one version of TensorRT, so it is built on the host that serves; the manifest holds
the command. f16 keeps norms and softmax in f32, because squares of large states leave f16's range, and so
does `inference.engines.tensorrt_engine`; int8 is its graph. Differences are those on ONNX Runtime's
processor kernels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import onnx

from compression.releases.registry import Artefact
from inference.buckets import BATCHES, CANDIDATES, HISTORIES
from inference.engines.base import TOLERANCE
from inference.engines.calibration import samples
from inference.engines.model_file import read_graph
from inference.engines.quantise import INTEGER_TOLERANCE, activations_in_int8
from inference.types import Graph
from infra.export.folder import (
    ExportFailed,
    ExportManifest,
    GraphEntry,
    check_free,
    write_export,
)
from infra.export.parity import largest_difference, reference

Types = Literal["f16", "int8"]
_TOLERANCE: Final[dict[Types, float]] = {"f16": TOLERANCE["f16"], "int8": INTEGER_TOLERANCE}
_WIDE: Final = ("Pow", "ReduceMean", "Sqrt", "Div", "Softmax", "LayerNormalization")
_BATCHES: Final = 8
_SEED: Final = 29  # not that of the samples which int8's ranges are taken from


def export(artefact: Artefact, out: Path, *, numbers: Types = "f16") -> ExportManifest:
    """Write every graph of the version. Raises `ExportFailed` where answers differ by more than the engine's
    tolerance for these numbers, `ArtefactInvalid`, `ModelUnavailable`."""
    check_free(out)
    contents: dict[str, bytes] = {}
    graphs: dict[Graph, GraphEntry] = {}
    for graph in artefact.manifest.graphs:
        published = read_graph(artefact, graph)
        if numbers == "int8":
            content = activations_in_int8(published, samples(artefact, graph))
        else:
            content = in_f16(published)
        asked = samples(artefact, graph, batches=_BATCHES, seed=_SEED)
        difference = largest_difference(reference(content), reference(published), asked)
        if not difference <= _TOLERANCE[numbers]:
            raise ExportFailed(
                f"the {graph} graph in {numbers} differs by {difference:.1e} from the published one"
            )
        file = f"{graph}.onnx"
        contents[file] = content
        command = build_command(content, graph, artefact.manifest.model.max_history)
        graphs[graph] = GraphEntry(files=(file,), max_difference=difference, build=command)
    return write_export("tensorrt", artefact, numbers, graphs, contents, out)


def in_f16(content: bytes) -> bytes:
    """The same graph, weights and arithmetic in f16 but for norms and softmax; inputs and outputs f32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = convert_float_to_float16(
        onnx.ModelProto.FromString(content), keep_io_types=True, op_block_list=list(_WIDE)
    )
    # Where several operators read one tensor, its cast is written once for each, all under one name; and
    # casts stand at the end, where only ONNX Runtime finds them.
    nodes = list({node.SerializeToString(): node for node in model.graph.node}.values())
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    OnnxModel(model).topological_sort()
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def build_command(content: bytes, graph: Graph, longest: int) -> str:
    """trtexec, for the shapes that engines here are warmed with."""
    sizes = {
        "users": (1, BATCHES[-1]),
        "slots": (min(HISTORIES[0], longest), longest),
        "candidates": (1, CANDIDATES[-1]),
    }
    shapes: dict[str, list[str]] = {"min": [], "opt": [], "max": []}
    for value in onnx.ModelProto.FromString(content).graph.input:
        for name, largest in (("min", 0), ("opt", 1), ("max", 1)):
            dims = [
                str(sizes[size.dim_param][largest] if size.dim_param else size.dim_value)
                for size in value.type.tensor_type.shape.dim
            ]
            shapes[name].append(f"{value.name}:{'x'.join(dims)}")
    given = [f"--{name}Shapes={','.join(of)}" for name, of in shapes.items()]
    return " ".join(
        ["trtexec", "--stronglyTyped", f"--onnx={graph}.onnx", *given, f"--saveEngine={graph}.plan"]
    )
