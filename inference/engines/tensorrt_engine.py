"""TensorRT 10 on an NVIDIA GPU: plans built here, from the checked graphs, for the shapes that are warmed.

A plan is built at warm-up and kept (`plan_cache`), because it fits only the GPU and the version it was
built with. int8 makes the products integer ones, with ranges from histories drawn from the artefact.

No GPU was at hand when this was written: it follows the Python API of TensorRT 10.16 and has not run.
What could be measured without one is the error of the int8 graph, on ONNX Runtime's CPU kernels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import tensorrt as trt
from cuda.bindings import runtime as cuda

from compression.releases.registry import Artefact
from inference.engines.base import GRAPHS, Engine, EngineOptions, Shape, inputs_of, outputs_of
from inference.engines.calibration import samples
from inference.engines.model_file import read_graph
from inference.engines.plan_cache import PlanCache, PlanKey, Profile, profile_of
from inference.engines.quantise import activations_in_int8
from inference.errors import EngineFailed, ModelUnavailable
from inference.types import Graph, Tensors

WORKSPACE_BYTES: Final = 2**30
_FLAGS: Final = {"f32": (), "bf16": ("BF16",), "f16": ("FP16",), "int8": ("INT8", "FP16")}


@dataclass(slots=True)
class _Loaded:
    """A plan ready to run: its context, its stream and one device buffer per tensor."""

    engine: Any
    context: Any
    stream: Any
    buffers: dict[str, Any]


class TensorRtEngine(Engine):
    name = "tensorrt"
    precisions = ("f32", "bf16", "f16", "int8")

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._contents: dict[Graph, bytes] = {}
        self._loaded: dict[Graph, _Loaded] = {}
        self._log = trt.Logger(trt.Logger.WARNING)
        try:
            self._gpu = _ok(cuda.cudaGetDeviceProperties(0))
        except RuntimeError as error:
            raise ModelUnavailable(f"TensorRT finds no NVIDIA GPU here: {error}") from error
        self._plans = PlanCache(Path(options.plans) if options.plans else None)

    def load(self, artefact: Artefact, graphs: Sequence[Graph] = GRAPHS) -> None:
        self.model = artefact.manifest.model
        for graph in graphs:
            content = read_graph(artefact, graph)
            if self.options.precision == "int8":
                content = activations_in_int8(content, samples(artefact, graph))
            self._contents[graph] = content

    def warm_up(self, shapes: Iterable[Shape], *, repeats: int = 3) -> dict[Shape, float]:
        shapes = list(shapes)
        for graph in self._contents:
            wanted = [self.example(shape) for shape in shapes if shape.graph == graph]
            if wanted:
                self._free(graph)
                self._loaded[graph] = self._prepare(graph, profile_of(wanted))
        return super().warm_up(shapes, repeats=repeats)

    def run(self, graph: Graph, inputs: Tensors) -> Tensors:
        loaded = self._loaded.get(graph)
        if loaded is None:
            raise EngineFailed(f"tensorrt: {graph} has not been warmed")
        try:
            return self._run(loaded, graph, inputs)
        except (RuntimeError, KeyError) as error:
            raise EngineFailed(f"tensorrt: {graph}: {error}") from error

    def close(self) -> None:
        for graph in list(self._loaded):
            self._free(graph)
        self._contents.clear()

    def _run(self, loaded: _Loaded, graph: Graph, inputs: Tensors) -> Tensors:
        context, stream, to_device = loaded.context, loaded.stream, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        for name in inputs_of(graph, self.model):
            array = inputs[name]
            if not context.set_input_shape(name, array.shape):
                raise RuntimeError(f"{name} of the shape {list(array.shape)} was not warmed")
            _ok(
                cuda.cudaMemcpyAsync(loaded.buffers[name], array.ctypes.data, array.nbytes, to_device, stream)
            )
        if missing := context.infer_shapes():
            raise RuntimeError(f"no shape for {', '.join(missing)}")
        if not context.execute_async_v3(int(stream)):
            raise RuntimeError("the GPU refused the work")
        outputs: Tensors = {}
        for name in outputs_of(graph, self.model):
            outputs[name] = np.empty(tuple(context.get_tensor_shape(name)), np.float32)
            target, to_host = outputs[name], cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
            _ok(
                cuda.cudaMemcpyAsync(target.ctypes.data, loaded.buffers[name], target.nbytes, to_host, stream)
            )
        _ok(cuda.cudaStreamSynchronize(stream))
        return outputs

    def _prepare(self, graph: Graph, profile: Profile) -> _Loaded:
        content = self._contents[graph]
        key = PlanKey(
            onnx_sha256=hashlib.sha256(content).hexdigest(),
            gpu=bytes(self._gpu.name).rstrip(b"\0").decode(errors="replace"),
            capability=f"{self._gpu.major}.{self._gpu.minor}",
            tensorrt=trt.__version__,
            precision=self.options.precision,
            profile=profile,
        )
        plan = self._plans.get(key)
        if plan is None:
            plan = self._build(graph, content, profile)
            self._plans.put(key, plan)
        engine = trt.Runtime(self._log).deserialize_cuda_engine(plan)
        if engine is None:
            raise ModelUnavailable(f"TensorRT cannot load the plan of the {graph} graph")
        context = engine.create_execution_context()
        loaded = _Loaded(engine, context, _ok(cuda.cudaStreamCreate()), {})
        for name in inputs_of(graph, self.model):
            context.set_input_shape(name, profile[name][1])
        for name in (*inputs_of(graph, self.model), *outputs_of(graph, self.model)):
            size = 4 * int(np.prod(tuple(context.get_tensor_shape(name))))  # int32 or float32, all of them
            loaded.buffers[name] = _ok(cuda.cudaMalloc(size))
            context.set_tensor_address(name, int(loaded.buffers[name]))
        return loaded

    def _build(self, graph: Graph, content: bytes, profile: Profile) -> bytes:
        builder = trt.Builder(self._log)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, self._log)
        if not parser.parse(content):
            errors = "; ".join(parser.get_error(place).desc() for place in range(parser.num_errors))
            raise ModelUnavailable(f"TensorRT refused the {graph} graph: {errors}")
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
        config.clear_flag(trt.BuilderFlag.TF32)  # f32 means f32
        for flag in _FLAGS[self.options.precision]:
            config.set_flag(getattr(trt.BuilderFlag, flag))
        if "FP16" in _FLAGS[self.options.precision]:
            _keep_wide(network, config)
        shapes = builder.create_optimization_profile()
        for name, (smallest, largest) in profile.items():
            shapes.set_shape(name, smallest, largest, largest)
        if config.add_optimization_profile(shapes) < 0:
            raise ModelUnavailable(f"TensorRT refused the shapes of the {graph} graph")
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise ModelUnavailable(f"TensorRT could not build the {graph} graph; its log says why")
        return bytes(plan)

    def _free(self, graph: Graph) -> None:
        loaded = self._loaded.pop(graph, None)
        if loaded is not None:
            for buffer in loaded.buffers.values():
                cuda.cudaFree(buffer)
            cuda.cudaStreamDestroy(loaded.stream)


def _keep_wide(network: Any, config: Any) -> None:
    """Norms and softmax stay in f32: squares of large states leave f16's range."""
    config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
    for place in range(network.num_layers):
        layer = network.get_layer(place)
        squares = "Pow" in layer.name  # layers are named after the operators of the graph
        if squares or layer.type in (trt.LayerType.REDUCE, trt.LayerType.SOFTMAX):
            layer.precision = trt.float32


def _ok(result: tuple[Any, ...]) -> Any:
    """What a call to CUDA returned beside its error code, or `RuntimeError` with the error's name."""
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(error.name)
    return values[0] if len(values) == 1 else tuple(values)
