"""Engines by name. Naming one here costs nothing; its library is imported when it is created.

>>> [status.name for status in usable()]
['torch', 'onnx', 'openvino', 'tensorrt', 'numpy', 'remote']
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Final, cast

from inference.engines.base import Engine, EngineOptions, Precision
from inference.errors import ModelUnavailable


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Whether an engine can be created here, and why not; the version of its library, empty without it."""

    name: str
    usable: bool
    why: str
    version: str = ""
    precisions: tuple[Precision, ...] = ()


@dataclass(frozen=True, slots=True)
class _Kind:
    """Where an engine is, the packages it needs (its own library first), and what it computes in."""

    module: str
    engine: str
    packages: tuple[str, ...]
    precisions: tuple[Precision, ...]
    needs: Callable[[EngineOptions], str] = lambda _: ""  # why it will not do here, or nothing
    prepares: Callable[[EngineOptions], bool] = lambda _: False


def _needs_server(options: EngineOptions) -> str:
    return "" if options.url else "name its server: INFERENCE_LANES='remote,url=HOST:PORT'"


def _needs_nvidia(_: EngineOptions) -> str:
    nodes = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    return "" if nodes else "no NVIDIA GPU is here"


_KINDS: Final[dict[str, _Kind]] = {
    "torch": _Kind("torch_engine", "TorchEngine", ("torch", "safetensors"), ("f32", "bf16", "f16")),
    "onnx": _Kind(
        "onnx_engine",
        "OnnxEngine",
        ("onnxruntime", "onnx"),
        ("f32", "f16"),
        prepares=lambda options: options.provider == EngineOptions().provider,
    ),
    "openvino": _Kind(
        "openvino_engine", "OpenVinoEngine", ("openvino", "onnx"), ("f32", "bf16", "f16", "int8")
    ),
    "tensorrt": _Kind(
        "tensorrt_engine",
        "TensorRtEngine",
        ("tensorrt", "cuda.bindings", "onnx", "onnxruntime"),
        ("f32", "bf16", "f16", "int8"),
        _needs_nvidia,
    ),
    "numpy": _Kind("numpy_engine", "NumpyEngine", ("onnx",), ("f32",)),
    "remote": _Kind("remote_engine", "RemoteEngine", ("grpc",), ("f32",), _needs_server),
}
AUTO: Final = "auto"
_AUTO: Final = ("onnx", "openvino", "torch")  # fastest first, as measured


def names() -> list[str]:
    """Every engine we know."""
    return list(_KINDS)


def usable() -> list[EngineStatus]:
    """Every engine we know, with whether this machine has what it needs. Imports none of their libraries."""
    return [_status(name) for name in _KINDS]


def create(name: str = "auto", options: EngineOptions | None = None) -> Engine:
    """An engine by name; "auto" is the first of onnx, openvino, torch that is installed."""
    name = _chosen(name)
    if name not in _KINDS:
        raise ModelUnavailable(f"no engine is called {name!r}; there are {', '.join(_KINDS)}")
    options = options or EngineOptions()
    status = _status(name, options)
    if not status.usable:
        raise ModelUnavailable(f"engine {name}: {status.why}")
    kind = _KINDS[name]
    try:
        made = getattr(importlib.import_module(f"inference.engines.{kind.module}"), kind.engine)
    except (ImportError, OSError) as error:  # a library that is installed and cannot be loaded
        raise ModelUnavailable(f"engine {name}: {error}") from error
    return cast(Engine, made(options))


def prepares(name: str, options: EngineOptions) -> bool:
    """Whether an engine can do the long part of loading in another process (`Engine.prepare`)."""
    kind = _KINDS.get(_chosen(name))
    return kind is not None and kind.prepares(options)


def places(name: str) -> dict[str, tuple[Precision, ...]]:
    """Devices, or ONNX Runtime's providers, that a usable engine can be given here, and the precisions
    each computes in. Imports the engine's library."""
    return {
        place: tuple(
            precision
            for precision in _KINDS[name].precisions
            if _accepts(name, placed(name, place, EngineOptions(precision=precision)))
        )
        for place in _places(name)
    }


def placed(name: str, place: str, options: EngineOptions) -> EngineOptions:
    """The same options for one of an engine's `places`."""
    return replace(options, provider=place) if name == "onnx" else replace(options, device=place)


def _chosen(name: str) -> str:
    if name != AUTO:
        return name
    for choice in _AUTO:
        if _status(choice).usable:
            return choice
    raise ModelUnavailable(f"no engine is installed here: pip install one of {', '.join(_AUTO)}")


def _places(name: str) -> list[str]:
    if name == "torch":
        import torch

        return ["cpu", *(f"cuda:{place}" for place in range(torch.cuda.device_count()))]
    if name == "onnx":
        from inference.engines.onnx_engine import providers

        return providers()
    if name == "openvino":
        from inference.engines.openvino_engine import devices

        return devices()
    return ["cuda:0" if name == "tensorrt" else "cpu"]


def _accepts(name: str, options: EngineOptions) -> bool:
    try:
        create(name, options).close()
    except ModelUnavailable:
        return False
    return True


def _status(name: str, options: EngineOptions | None = None) -> EngineStatus:
    kind = _KINDS[name]
    missing = next((package for package in kind.packages if not _installed(package)), "")
    why = (
        f"the Python package {missing} is not installed"
        if missing
        else kind.needs(options or EngineOptions())
    )
    return EngineStatus(name, not why, why, _version(kind.packages[0]), kind.precisions)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a package within one that is missing
        return False


def _version(package: str) -> str:
    """Of the distribution that brought the package: onnxruntime comes under several names."""
    for name in (package, f"{package}-gpu", f"{package}-openvino", f"{package}-migraphx"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""
