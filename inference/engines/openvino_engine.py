"""OpenVINO, on the device named, reading the ONNX graphs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import openvino as ov
import openvino.properties as props
import openvino.properties.hint as hints

from compression.registry import Artefact
from inference.engines.base import GRAPHS, OUTPUTS, Engine, EngineOptions
from inference.errors import EngineFailed, ModelUnavailable
from inference.types import Graph, Tensors


class OpenVinoEngine(Engine):
    name = "openvino"

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._requests: dict[Graph, Any] = {}

    def load(self, artefact: Artefact, graphs: Sequence[Graph] = GRAPHS) -> None:
        core = ov.Core()
        precision = ov.Type.bf16 if self.options.precision == "bf16" else ov.Type.f32
        config = {
            props.inference_num_threads: self.options.threads,
            hints.performance_mode: hints.PerformanceMode.LATENCY,
            hints.inference_precision: precision,
            hints.num_requests: 1,
        }
        self.model = artefact.manifest.model
        for graph in graphs:
            content = artefact.read(artefact.manifest.graphs[graph])
            try:
                model = core.read_model(io.BytesIO(content))
                self._requests[graph] = core.compile_model(
                    model, self.options.device, config
                ).create_infer_request()
            except RuntimeError as error:
                raise ModelUnavailable(f"OpenVINO refused the {graph} graph: {error}") from error

    def run(self, graph: Graph, inputs: Tensors) -> Tensors:
        request = self._requests[graph]
        try:
            request.infer(inputs, share_inputs=True)
            # A copy: the request's own buffers are overwritten by the next run.
            return {name: request.get_tensor(name).data.copy() for name in OUTPUTS[graph]}
        except RuntimeError as error:
            raise EngineFailed(f"openvino: {graph}: {error}") from error

    def close(self) -> None:
        self._requests.clear()
