"""Triton itself, from the wheel of nvidia-pytriton, with a Python-backend model and dynamic batching.

The wheel has no ONNX Runtime backend; the model runs it in the backend's own stub processes, one
instance each, without PyTriton's further hop to another process.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytriton

import infra
from infra.bench.serve.rivals.session import PORT, WAIT_MS, WORKERS
from infra.bench.serve.shape import CANDIDATES, COLUMNS, HISTORY, MAX_LISTS

NAME = "tailrace-rank"
SIZES = {
    **dict.fromkeys(COLUMNS, HISTORY),
    "candidates": CANDIDATES,
    "candidate_categories": CANDIDATES,
}


def config() -> str:
    """The model's config.pbtxt. The batch dimension is not named: Triton adds it."""
    inputs = [f'{{ name: "{name}" data_type: TYPE_INT32 dims: [{size}] }}' for name, size in SIZES.items()]
    # Triton wants a dimension beside that of the batch; the model gets one number a list.
    inputs.append('{ name: "lengths" data_type: TYPE_INT32 dims: [1] reshape: { shape: [] } }')
    return f"""
name: "{NAME}"
backend: "python"
max_batch_size: {MAX_LISTS}
input [ {", ".join(inputs)} ]
output [ {{ name: "scores" data_type: TYPE_FP32 dims: [{CANDIDATES}] }} ]
instance_group [ {{ kind: KIND_CPU count: {WORKERS} }} ]
dynamic_batching {{ max_queue_delay_microseconds: {int(WAIT_MS * 1000)} }}
"""


def main() -> None:
    """Lay out a model repository here and become tritonserver."""
    folder = Path.cwd() / "triton"
    version = folder / "models" / NAME / "1"
    version.mkdir(parents=True, exist_ok=True)
    (version.parent / "config.pbtxt").write_text(config())
    # The stubs look for modules nowhere but beside the model and in the environment.
    root = str(Path(infra.__file__).parents[1])
    (version / "model.py").write_text(
        f"import sys; sys.path.insert(0, {root!r})\n"
        "from infra.bench.serve.rivals.triton_model import TritonPythonModel\n"
    )
    wheel = Path(pytriton.__file__).parent
    backends = folder / "backends"
    if not backends.exists():
        shutil.copytree(wheel / "tritonserver" / "backends", backends)
    stub = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(
        wheel / "tritonserver" / "python_backend_stubs" / stub / "triton_python_backend_stub",
        backends / "python" / "triton_python_backend_stub",
    )
    # The stubs find their interpreter on the path, and the server its libraries beside the package.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ["VIRTUAL_ENV"] = sys.prefix
    os.environ["LD_LIBRARY_PATH"] = str(wheel.parent / "nvidia_pytriton.libs")
    server = str(wheel / "tritonserver" / "bin" / "tritonserver")
    options = {
        "model-repository": str(folder / "models"),
        "backend-directory": str(backends),
        "grpc-address": "127.0.0.1",
        "grpc-port": str(PORT),
        "allow-http": "false",
        "allow-metrics": "false",
        "log-verbose": "0",
    }
    os.execv(server, [server, *(f"--{name}={value}" for name, value in options.items())])  # noqa: S606


if __name__ == "__main__":
    main()
