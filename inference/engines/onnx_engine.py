"""ONNX Runtime, on any execution provider it has, named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from compression.releases.registry import Artefact, ModelShape
from inference.engines.base import GRAPHS, Engine, EngineOptions, Precision, outputs_of
from inference.engines.model_file import read_graph
from inference.engines.shared_weights import share_weights
from inference.errors import EngineFailed, ModelUnavailable
from inference.types import Graph, Tensors

# Its exceptions have no common base but Exception.
_ERRORS: Final[tuple[type[Exception], ...]] = (
    *(kind for kind in vars(_state).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    RuntimeError,
    ValueError,
)
_SUFFIX: Final = "ExecutionProvider"
_CPU: Final = "CPUExecutionProvider"
# What people call a provider, where that is not its name without the suffix.
_ALIASES: Final = {
    "directml": "dml",
    "onednn": "dnnl",
    "rocm": "migraphx",  # ROCm's own provider has left ONNX Runtime
    "trt": "tensorrt",
}
# Providers that compute an f32 graph in another precision when told, and how they are told.
_LOWERED: Final[dict[tuple[str, Precision], dict[str, str]]] = {
    ("TensorrtExecutionProvider", "f16"): {"trt_fp16_enable": "1"},
    ("MIGraphXExecutionProvider", "f16"): {"migraphx_fp16_enable": "1"},
}
_LEAST_MAPPED: Final = "4096"  # bytes; smaller constants stay in the graph
_SETTINGS: Final = {"CUDAExecutionProvider": {"use_tf32": "0"}}  # f32 means f32


def providers() -> list[str]:
    """Names of the providers that this installation can use, as `provider` takes them. Azure's sends
    what it is asked to a server elsewhere and is left out."""
    short = [str(name).removesuffix(_SUFFIX).lower() for name in ort.get_available_providers()]
    return [name for name in short if name != "azure"]


def provider_name(asked: str) -> str:
    """ONNX Runtime's name of a provider: "cuda" is CUDAExecutionProvider. `ModelUnavailable` without it."""
    short = asked.removesuffix(_SUFFIX).lower()
    short = _ALIASES.get(short, short)
    for name in ort.get_available_providers():
        if str(name).removesuffix(_SUFFIX).lower() == short:
            return str(name)
    known = any(str(name).removesuffix(_SUFFIX).lower() == short for name in ort.get_all_providers())
    why = f"was built without {asked}" if known else f"knows no provider {asked}"
    has = ", ".join(ort.get_available_providers())
    raise ModelUnavailable(f"ONNX Runtime here {why}; it has {has}")


class OnnxEngine(Engine):
    name = "onnx"
    precisions = ("f32", "f16")

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._sessions: dict[Graph, ort.InferenceSession] = {}
        self._provider = provider_name(options.provider)
        self.compiles_shapes = self._provider != _CPU
        settings = _SETTINGS.get(self._provider, {})
        if options.precision != "f32":
            lowered = _LOWERED.get((self._provider, options.precision))
            if lowered is None:
                raise ModelUnavailable(
                    f"the onnx engine computes in f32 on {self._provider}, not {options.precision}"
                )
            settings = {**settings, **lowered}
        self._providers: list[Any] = [(self._provider, settings)]
        if self._provider != _CPU:
            self._providers.append(_CPU)  # for the operators that it leaves over

    def load(self, artefact: Artefact, graphs: Sequence[Graph] = GRAPHS) -> None:
        self.model = artefact.manifest.model
        for graph in graphs:
            self._sessions[graph] = self._session(graph, read_graph(artefact, graph), self._settings())

    def prepare(self, artefact: Artefact, graphs: Sequence[Graph], folder: Path) -> None:
        """Optimised graphs, their weights in a file of their own, which sessions map and so share."""
        for graph in graphs:
            settings = self._settings()
            settings.optimized_model_filepath = str(folder / f"{graph}.onnx")
            for key, value in (("file_name", f"{graph}.weights"), ("min_size_in_bytes", _LEAST_MAPPED)):
                settings.add_session_config_entry(
                    f"session.optimized_model_external_initializers_{key}", value
                )
            self._session(graph, read_graph(artefact, graph), settings)
        share_weights([folder / f"{graph}.onnx" for graph in graphs])

    def load_prepared(self, model: ModelShape, graphs: Sequence[Graph], folder: Path) -> None:
        self.model = model
        for graph in graphs:
            settings = self._settings()
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            self._sessions[graph] = self._session(graph, str(folder / f"{graph}.onnx"), settings)

    def beside(self) -> OnnxEngine | None:
        """A session on the CPU may be run by several threads at once."""
        if self._provider != _CPU:
            return None
        other = OnnxEngine(self.options)
        other.model = self.model
        other._sessions = dict(self._sessions)
        return other

    def _settings(self) -> ort.SessionOptions:
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = self.options.threads
        settings.inter_op_num_threads = 1
        settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        settings.log_severity_level = 3
        # A spinning pool would take the core that the event loop needs.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        settings.add_session_config_entry("session.inter_op.allow_spinning", "0")
        return settings

    def _session(self, graph: Graph, source: bytes | str, settings: ort.SessionOptions) -> Any:
        try:
            session = ort.InferenceSession(source, settings, providers=self._providers)
        except _ERRORS as error:
            raise ModelUnavailable(f"ONNX Runtime refused the {graph} graph: {error}") from error
        # A provider whose libraries or GPU are missing is left out with no more than a warning.
        if self._provider not in session.get_providers():
            raise ModelUnavailable(f"ONNX Runtime could not start {self._provider} here")
        return session

    def run(self, graph: Graph, inputs: Tensors) -> Tensors:
        names = outputs_of(graph, self.model)
        try:
            outputs = self._sessions[graph].run(names, inputs)
        except _ERRORS as error:
            raise EngineFailed(f"onnx: {graph}: {error}") from error
        return dict(zip(names, outputs, strict=True))

    def close(self) -> None:
        self._sessions.clear()
