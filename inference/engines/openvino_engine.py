"""OpenVINO, on the device named, reading the ONNX graphs.

int8 means tables and matrices in int8, rounded when a graph is loaded; activations stay f32. It saves
three quarters of a table's memory and no time: inference/LOG.md has the figures, and what else was tried.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Final

import openvino as ov
import openvino.properties as props
import openvino.properties.device as device_props
import openvino.properties.hint as hints

from compression.releases.registry import Artefact
from inference.engines.base import GRAPHS, Engine, EngineOptions, Precision, inputs_of, outputs_of
from inference.engines.model_file import read_graph
from inference.engines.openvino_core import core
from inference.engines.quantise import weights_in_int8
from inference.errors import EngineFailed, ModelUnavailable
from inference.types import Graph, Tensors

_TYPES: Final = {"f32": ov.Type.f32, "bf16": ov.Type.bf16, "f16": ov.Type.f16, "int8": ov.Type.f32}
_CAPABILITY: Final[dict[Precision, str]] = {"bf16": "BF16", "f16": "FP16"}
_COMBINED: Final = ("AUTO", "HETERO", "MULTI")


def devices() -> list[str]:
    """Names of the devices here, as `device` takes them."""
    return [str(name) for name in core().available_devices]


class OpenVinoEngine(Engine):
    name = "openvino"
    precisions = ("f32", "bf16", "f16", "int8")

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._requests: dict[Graph, Any] = {}
        # What a graph declares and nothing in it reads has no place in what was compiled.
        self._read: dict[Graph, list[str]] = {}
        self._core = core()
        self._device = options.device.upper()
        self._check_device()

    def load(self, artefact: Artefact, graphs: Sequence[Graph] = GRAPHS) -> None:
        config = {
            props.inference_num_threads: self.options.threads,
            hints.performance_mode: hints.PerformanceMode.LATENCY,
            hints.inference_precision: _TYPES[self.options.precision],
            hints.num_requests: 1,
            # Pinned, the engines of a process would all sit on the same processor.
            hints.enable_cpu_pinning: False,
        }
        self.model = artefact.manifest.model
        for graph in graphs:
            content = read_graph(artefact, graph)
            if self.options.precision == "int8":
                content = weights_in_int8(content)
            try:
                model = self._core.read_model(io.BytesIO(content))
                compiled = self._core.compile_model(model, self._device, config)
                self._requests[graph] = compiled.create_infer_request()
                read = {name for port in compiled.inputs for name in port.names}
                self._read[graph] = [name for name in inputs_of(graph, self.model) if name in read]
            except RuntimeError as error:
                raise ModelUnavailable(f"OpenVINO refused the {graph} graph: {error}") from error

    def run(self, graph: Graph, inputs: Tensors) -> Tensors:
        request = self._requests[graph]
        try:
            request.infer({name: inputs[name] for name in self._read[graph]}, share_inputs=True)
            # A copy: the request's own buffers are overwritten by the next run.
            names = outputs_of(graph, self.model)
            return {name: request.get_tensor(name).data.copy() for name in names}
        except RuntimeError as error:
            raise EngineFailed(f"openvino: {graph}: {error}") from error

    def close(self) -> None:
        self._requests.clear()

    def _check_device(self) -> None:
        """Refuse a device that is not here, or that would silently compute in another precision."""
        asked = self._device
        here = [str(name) for name in self._core.available_devices]
        if asked.partition(":")[0] in _COMBINED:
            return
        if asked not in here and asked not in {name.partition(".")[0] for name in here}:
            raise ModelUnavailable(f"OpenVINO finds no device {asked} here; it has {', '.join(here)}")
        needed = _CAPABILITY.get(self.options.precision)
        can = self._core.get_property(asked, device_props.capabilities)
        if needed and needed not in can:
            raise ModelUnavailable(f"OpenVINO's {asked} here does not compute in {self.options.precision}")
