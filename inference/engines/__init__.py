"""Engines by name. Naming one here costs nothing; its library is imported when it is created.

>>> [status.name for status in usable()]
['torch', 'onnx', 'openvino', 'numpy', 'remote']
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from inference.engines.base import Engine, EngineOptions
from inference.errors import ModelUnavailable


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Whether an engine can be created here, and why not."""

    name: str
    usable: bool
    why: str


def _torch(options: EngineOptions) -> Engine:
    from inference.engines.torch_engine import TorchEngine

    return TorchEngine(options)


def _onnx(options: EngineOptions) -> Engine:
    from inference.engines.onnx_engine import OnnxEngine

    return OnnxEngine(options)


def _openvino(options: EngineOptions) -> Engine:
    from inference.engines.openvino_engine import OpenVinoEngine

    return OpenVinoEngine(options)


def _numpy(options: EngineOptions) -> Engine:
    from inference.engines.numpy_engine import NumpyEngine

    return NumpyEngine(options)


def _remote(options: EngineOptions) -> Engine:
    from inference.engines.remote_engine import RemoteEngine

    return RemoteEngine(options)


_FACTORIES: Final[dict[str, Callable[[EngineOptions], Engine]]] = {
    "torch": _torch,
    "onnx": _onnx,
    "openvino": _openvino,
    "numpy": _numpy,
    "remote": _remote,
}
_LIBRARIES: Final[dict[str, str]] = {
    "torch": "torch",
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "numpy": "onnx",
    "remote": "grpc",
}
AUTO: Final = "auto"
_AUTO: Final = ("onnx", "openvino", "torch")  # fastest first, as measured
_REMOTE: Final = "remote"


def names() -> list[str]:
    """Every engine we know."""
    return list(_FACTORIES)


def usable() -> list[EngineStatus]:
    """Every engine we know, with whether its library is installed. Imports none of them."""
    return [_status(name) for name in _FACTORIES if name != _REMOTE] + [_remote_status()]


def create(name: str = "auto", options: EngineOptions | None = None) -> Engine:
    """An engine by name; "auto" is the first of onnx, openvino, torch that is installed."""
    if name == AUTO:
        name = next((choice for choice in _AUTO if _status(choice).usable), "")
        if not name:
            raise ModelUnavailable(f"no engine is installed here: pip install one of {', '.join(_AUTO)}")
    if name not in _FACTORIES:
        raise ModelUnavailable(f"no engine is called {name!r}; there are {', '.join(_FACTORIES)}")
    status = _status(name)
    if not status.usable:
        raise ModelUnavailable(f"engine {name}: {status.why}")
    return _FACTORIES[name](options or EngineOptions())


def _status(name: str) -> EngineStatus:
    library = _LIBRARIES[name]
    if importlib.util.find_spec(library) is None:
        return EngineStatus(name, False, f"the Python package {library} is not installed")
    return EngineStatus(name, True, "")


def _remote_status() -> EngineStatus:
    """Usable by itself it never is: somebody has to name the server."""
    status = _status(_REMOTE)
    why = status.why or "name its server: INFERENCE_LANES='remote,url=HOST:PORT'"
    return EngineStatus(_REMOTE, False, why)
