"""The graphs of a version as OpenVINO's intermediate representation, .xml and .bin.

int8 is what the engine makes of a graph when it loads one: tables and matrices rounded, arithmetic f32.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Final, Literal

import openvino as ov
import openvino.properties.hint as hints

from compression.releases.registry import Artefact, ModelShape
from inference.engines.base import TOLERANCE, outputs_of
from inference.engines.calibration import samples
from inference.engines.model_file import read_graph
from inference.engines.openvino_core import core
from inference.engines.quantise import weights_in_int8
from inference.types import Graph, Tensors
from infra.export.folder import (
    ExportFailed,
    ExportManifest,
    GraphEntry,
    check_free,
    write_export,
)
from infra.export.parity import Run, largest_difference, reference

Weights = Literal["f32", "f16", "int8"]
WEIGHTS: Final = ("f32", "f16", "int8")
_BATCHES: Final = 8


def export(artefact: Artefact, out: Path, *, numbers: Weights = "f32") -> ExportManifest:
    """Write every graph of the version. Raises `ExportFailed` where answers differ by more than the engine's
    tolerance for these numbers, `ArtefactInvalid`, `ModelUnavailable`."""
    check_free(out)
    contents: dict[str, bytes] = {}
    graphs: dict[Graph, GraphEntry] = {}
    with tempfile.TemporaryDirectory(prefix="tailrace-openvino-") as name:
        for graph in artefact.manifest.graphs:
            published = read_graph(artefact, graph)
            path = Path(name) / f"{graph}.xml"
            _save(published, path, numbers)
            difference = largest_difference(
                _compiled(path, graph, artefact.manifest.model),
                reference(published),
                samples(artefact, graph, batches=_BATCHES),
            )
            if not difference <= TOLERANCE[numbers]:
                raise ExportFailed(
                    f"the {graph} graph in {numbers} differs by {difference:.1e} from the published one"
                )
            files = (path.name, f"{graph}.bin")
            contents |= {file: path.with_name(file).read_bytes() for file in files}
            graphs[graph] = GraphEntry(files=files, max_difference=difference)
    return write_export("openvino", artefact, numbers, graphs, contents, out)


def _save(published: bytes, path: Path, numbers: Weights) -> None:
    content = weights_in_int8(published) if numbers == "int8" else published
    model = core().read_model(io.BytesIO(content))
    ov.save_model(model, path, compress_to_fp16=numbers == "f16")


def _compiled(path: Path, graph: Graph, model: ModelShape) -> Run:
    """What was written, on this machine's processor in f32."""
    compiled = core().compile_model(path, "CPU", {hints.inference_precision: ov.Type.f32})
    request = compiled.create_infer_request()
    read = {name for port in compiled.inputs for name in port.names}

    def run(inputs: Tensors) -> Tensors:
        request.infer({name: inputs[name] for name in inputs if name in read}, share_inputs=True)
        return {name: request.get_tensor(name).data.copy() for name in outputs_of(graph, model)}

    return run
