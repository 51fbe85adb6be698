"""ONNX Runtime, on any execution provider it has, named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from compression.registry import Artefact
from inference.engines.base import GRAPHS, OUTPUTS, Engine, EngineOptions
from inference.errors import EngineFailed, ModelUnavailable
from inference.types import Graph, Tensors

# Its exceptions have no common base but Exception.
_ERRORS: Final[tuple[type[Exception], ...]] = (
    *(kind for kind in vars(_state).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    RuntimeError,
    ValueError,
)


class OnnxEngine(Engine):
    name = "onnx"

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._sessions: dict[Graph, ort.InferenceSession] = {}

    def load(self, artefact: Artefact, graphs: Sequence[Graph] = GRAPHS) -> None:
        provider = self.options.provider
        if provider not in ort.get_available_providers():
            known = ", ".join(ort.get_available_providers())
            raise ModelUnavailable(f"ONNX Runtime here has no {provider}; it has {known}")
        if self.options.precision != "f32":
            raise ModelUnavailable(f"the onnx engine computes in f32, not {self.options.precision}")
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = self.options.threads
        settings.inter_op_num_threads = 1
        settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        settings.log_severity_level = 3
        # A spinning pool would take the core that the event loop needs.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.model = artefact.manifest.model
        for graph in graphs:
            content = artefact.read(artefact.manifest.graphs[graph])
            try:
                self._sessions[graph] = ort.InferenceSession(content, settings, providers=[provider])
            except _ERRORS as error:
                raise ModelUnavailable(f"ONNX Runtime refused the {graph} graph: {error}") from error

    def run(self, graph: Graph, inputs: Tensors) -> Tensors:
        names = OUTPUTS[graph]
        try:
            outputs = self._sessions[graph].run(names, inputs)
        except _ERRORS as error:
            raise EngineFailed(f"onnx: {graph}: {error}") from error
        return dict(zip(names, outputs, strict=True))

    def close(self) -> None:
        self._sessions.clear()
