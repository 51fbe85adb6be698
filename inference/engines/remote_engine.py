"""Any server of the Open Inference Protocol over gRPC: ours, Triton, OpenVINO Model Server.

The graphs are computed elsewhere; what comes back is checked as if it came from a stranger. Retries are
the dispatcher's business: a call that fails fails once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import grpc
import numpy as np

from compression.releases.registry import Artefact
from inference.engines.base import GRAPHS, Engine, EngineOptions, inputs_of, outputs_of
from inference.errors import EngineFailed, InferenceError, ModelUnavailable
from inference.oip import open_inference_pb2 as pb
from inference.oip import open_inference_pb2_grpc as pb_grpc
from inference.oip.graph_specs import specs
from inference.oip.messages import channel_of, error_of, request_of, tensors_of
from inference.oip.models import TensorSpec
from inference.types import Graph, Tensors

_LOAD_TIMEOUT_S: Final = 5.0


class RemoteEngine(Engine):
    name = "remote"
    keeps_states = False

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._names: dict[Graph, str] = {}
        self._version = ""
        # Inputs of shape [users] that the server knows as [users, 1], as Triton does when it batches.
        self._columns: dict[Graph, set[str]] = {}
        self._channel: Any = None
        self._stub: Any = None

    def load(self, artefact: Artefact, graphs: Sequence[Graph] = GRAPHS) -> None:
        """Connect, and compare what the server says of each graph with what the artefact needs."""
        told = self.options
        if not told.url:
            raise ModelUnavailable("the remote engine needs the address of a server: url=HOST:PORT")
        self.close()
        self.model = artefact.manifest.model
        self._version = told.model_version.format(graph="", version=artefact.version)
        self._channel = channel_of(told.url, blocking=True)
        self._stub = pb_grpc.GRPCInferenceServiceStub(self._channel)
        try:
            for graph in graphs:
                self._names[graph] = told.model.format(graph=graph, version=artefact.version)
                self._columns[graph] = self._compare(graph)
        except InferenceError as error:
            self.close()
            raise ModelUnavailable(str(error)) from error

    def run(self, graph: Graph, inputs: Tensors) -> Tensors:
        return self.run_for(graph, inputs, outputs_of(graph, self.model))

    def run_for(self, graph: Graph, inputs: Tensors, outputs: Sequence[str]) -> Tensors:
        """Raises `EngineFailed`, also where the server is late: another lane may still be in time."""
        if self._stub is None:
            raise EngineFailed("remote: no model is loaded")
        columns = self._columns[graph]
        names = inputs_of(graph, self.model)
        sent = {name: inputs[name][:, None] if name in columns else inputs[name] for name in names}
        timeout_s = self.options.timeout_ms / 1e3
        request = request_of(self._names[graph], self._version, sent, outputs, timeout_s=timeout_s)
        try:
            answers = tensors_of(self._call("ModelInfer", request, timeout_s))
        except InferenceError as error:
            raise EngineFailed(f"remote: {graph}: {error}") from error
        return self._checked(graph, inputs, answers, outputs)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._channel = self._stub = None

    def _compare(self, graph: Graph) -> set[str]:
        """The inputs to send as columns. Raises `ModelUnavailable` where the server's model is not ours."""
        name = self._names[graph]
        ready = self._call("ModelReady", pb.ModelReadyRequest(name=name, version=self._version))
        where = f"{self.options.url}: {name}" + (f" {self._version}" if self._version else "")
        if not ready.ready:
            raise ModelUnavailable(f"{where} is not ready")
        told = self._call("ModelMetadata", pb.ModelMetadataRequest(name=name, version=self._version))
        inputs, outputs = specs(graph, self.model)
        theirs = {tensor.name: tensor for tensor in told.inputs}
        if set(theirs) != set(inputs_of(graph, self.model)):
            raise ModelUnavailable(f"{where} takes {', '.join(sorted(theirs))}")
        columns = set()
        for spec, tensor in ((spec, theirs[spec.name]) for spec in inputs):
            shape = list(tensor.shape)
            if len(shape) == len(spec.sizes) + 1 and shape[-1] == 1:
                columns.add(spec.name)
                shape.pop()
            _compare_tensor(where, spec, tensor.datatype, shape)
        given = {tensor.name: tensor for tensor in told.outputs}
        for spec in outputs:
            if spec.name not in given:
                raise ModelUnavailable(f"{where} gives no {spec.name}")
            _compare_tensor(where, spec, given[spec.name].datatype, list(given[spec.name].shape))
        return columns

    def _checked(self, graph: Graph, inputs: Tensors, answers: Tensors, outputs: Sequence[str]) -> Tensors:
        """The outputs asked for, of the right type and shape, and finite."""
        sizes: dict[str, int] = {}
        given, wanted = specs(graph, self.model)
        for spec in given:
            for size, actual in zip(spec.sizes, inputs[spec.name].shape, strict=True):
                if isinstance(size, str):
                    sizes[size] = actual
        checked: Tensors = {}
        for spec in wanted:
            if spec.name not in outputs:
                continue
            answer = answers.get(spec.name)
            if answer is None:
                raise EngineFailed(f"remote: {graph}: no {spec.name} came back")
            shape = tuple(size if isinstance(size, int) else sizes[size] for size in spec.sizes)
            if answer.shape != shape or answer.dtype != np.float32:
                came = f"{answer.dtype}{list(answer.shape)}"
                raise EngineFailed(f"remote: {graph}: {spec.name} came as {came}, not float32{list(shape)}")
            if not np.isfinite(answer).all():
                raise EngineFailed(f"remote: {graph}: {spec.name} holds numbers that are not finite")
            checked[spec.name] = answer
        return checked

    def _call(self, method: str, request: Any, timeout_s: float = _LOAD_TIMEOUT_S) -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise error_of(error, self.options.url) from error
        except ValueError as error:  # the channel was closed meanwhile
            raise EngineFailed(f"remote: {error}") from error


def _compare_tensor(where: str, spec: TensorSpec, datatype: str, shape: list[int]) -> None:
    """A free size may be fixed on neither side; a fixed one is the same or free on theirs."""
    fits = len(shape) == len(spec.sizes) and all(
        theirs in (-1, ours) for theirs, ours in zip(shape, spec.shape, strict=True)
    )
    if datatype != spec.datatype or not fits:
        raise ModelUnavailable(f"{where}: {spec.name} is {datatype}{shape}, not {spec.datatype}{spec.shape}")
