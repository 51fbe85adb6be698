"""A TensorRT and a CUDA of ordinary memory: plans are the ONNX bytes, the GPU is ONNX Runtime.

Stands in for what a machine without a GPU lacks. It keeps TensorRT's rules that our engine must: shapes
within the profile, an address for every tensor, no output before its work was started.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

builds: list[str] = []


class Code(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1


class Kind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class Builder:
    def __init__(self, log: Any) -> None:
        pass

    def create_network(self, flags: int) -> Any:
        return SimpleNamespace(num_layers=0, content=b"")

    def create_builder_config(self) -> Any:
        return Config()

    def create_optimization_profile(self) -> Any:
        ranges: dict[str, Any] = {}
        return SimpleNamespace(
            ranges=ranges, set_shape=lambda name, low, opt, high: ranges.update({name: (low, high)})
        )

    def build_serialized_network(self, network: Any, config: Any) -> bytes:
        builds.append(",".join(sorted(config.flags)))
        return network.content + repr(config.profile.ranges).encode().rjust(4096)


class Config:
    def __init__(self) -> None:
        self.flags: set[str] = {"TF32"}
        self.profile: Any = None

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        assert size > 0

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def add_optimization_profile(self, profile: Any) -> int:
        self.profile = profile
        return 0


class Parser:
    num_errors = 0

    def __init__(self, network: Any, log: Any) -> None:
        self.network = network

    def parse(self, content: bytes) -> bool:
        self.network.content = content
        return True


class Context:
    def __init__(self, plan: bytes) -> None:
        self.ranges = eval(plan[-4096:].decode().strip())
        self.session = ort.InferenceSession(plan[:-4096], providers=["CPUExecutionProvider"])
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, high = self.ranges[name]
        if len(shape) != len(low) or any(not a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return [value.name for value in self.session.get_inputs() if value.name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        sizes = {"users": self.shapes["lengths"][0]}
        sizes["slots"] = self.shapes["items" if "items" in self.shapes else "key_0"][1]
        sizes["candidates"] = self.shapes.get("candidates", (0, 0))[1]
        value = next(value for value in self.session.get_outputs() if value.name == name)
        return tuple(sizes.get(size, size) for size in value.shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        given = {}
        for value in self.session.get_inputs():
            kind = np.int32 if "int32" in value.type else np.float32
            array = np.empty(self.shapes[value.name], kind)
            ctypes.memmove(array.ctypes.data, self.addresses[value.name], array.nbytes)
            given[value.name] = array
        names = [value.name for value in self.session.get_outputs()]
        for name, output in zip(names, self.session.run(names, given), strict=True):
            ctypes.memmove(self.addresses[name], np.ascontiguousarray(output).ctypes.data, output.nbytes)
        return True


def modules() -> dict[str, ModuleType]:
    """What `sys.modules` needs for `import tensorrt` and `from cuda.bindings import runtime`."""
    trt = ModuleType("tensorrt")
    trt.__dict__.update(
        __version__="10.0.fake",
        Logger=type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None}),
        Builder=Builder,
        OnnxParser=Parser,
        Runtime=lambda log: SimpleNamespace(
            deserialize_cuda_engine=lambda plan: SimpleNamespace(
                create_execution_context=lambda: Context(plan)
            )
        ),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        BuilderFlag=SimpleNamespace(
            TF32="TF32",
            FP16="FP16",
            BF16="BF16",
            INT8="INT8",
            PREFER_PRECISION_CONSTRAINTS="PREFER_PRECISION_CONSTRAINTS",
        ),
        LayerType=SimpleNamespace(REDUCE=1, SOFTMAX=2),
        float32="float32",
    )
    held: dict[int, Any] = {}

    def malloc(size: int) -> tuple[Code, int]:
        memory = ctypes.create_string_buffer(size)
        held[ctypes.addressof(memory)] = memory
        return Code.cudaSuccess, ctypes.addressof(memory)

    def copy(target: int, source: int, size: int, kind: Kind, stream: int) -> tuple[Code]:
        memory = held.get(target if kind == Kind.cudaMemcpyHostToDevice else source)
        if memory is None or len(memory) < size:
            return (Code.cudaErrorInvalidValue,)
        ctypes.memmove(target, source, size)
        return (Code.cudaSuccess,)

    runtime = ModuleType("cuda.bindings.runtime")
    runtime.__dict__.update(
        cudaMemcpyKind=Kind,
        cudaGetDeviceProperties=lambda place: (
            Code.cudaSuccess,
            SimpleNamespace(name=b"A fake GPU\0\0", major=9, minor=0),
        ),
        cudaStreamCreate=lambda: (Code.cudaSuccess, 1),
        cudaStreamSynchronize=lambda stream: (Code.cudaSuccess,),
        cudaStreamDestroy=lambda stream: (Code.cudaSuccess,),
        cudaMalloc=malloc,
        cudaFree=lambda address: (
            Code.cudaSuccess if held.pop(address, None) else Code.cudaErrorInvalidValue,
        ),
        cudaMemcpyAsync=copy,
    )
    bindings = ModuleType("cuda.bindings")
    bindings.__dict__["runtime"] = runtime
    cuda = ModuleType("cuda")
    cuda.__dict__["bindings"] = bindings
    return {"tensorrt": trt, "cuda": cuda, "cuda.bindings": bindings, "cuda.bindings.runtime": runtime}
