"""A real Triton server on the CPU, from NVIDIA's pytriton wheel: our graphs as Python-backend models.

It lives in a venv of its own: what it pins (numpy 1, protobuf 6) is not what we run on, and its Python
has to be one that it brings a stub for. tritonclient comes with it.
"""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

from compression.home import home
from compression.releases.registry import Artefact
from inference.engines.base import GRAPHS
from inference.oip.graph_specs import specs
from inference.oip.models import TensorSpec
from inference.types import Graph
from infra.local.paths import INFRA
from infra.local.server import HOST, LocalServer, ServerFailed, free_port

PACKAGES: Final = ("nvidia-pytriton==0.7.0", "tritonclient[grpc,http]==2.73.0", "onnxruntime==1.31.1")
MODEL: Final = INFRA / "triton" / "model.py"
MAX_BATCH: Final = 64
# A Python that the wheel has a stub for; the system's first, which loads its own shared library.
_PYTHONS: Final = ("/usr/bin/python3", "python3", "python3.12", "python3.11", "python3.10")
_STUBS: Final = ("3.10", "3.11", "3.12", "3.13")
_TYPES: Final = {"INT32": "TYPE_INT32", "INT64": "TYPE_INT64", "FP32": "TYPE_FP32"}


def venv_dir() -> Path:
    """Where this version's venv is, or will be. The name changes with what is pinned."""
    pinned = "-".join(package.rpartition("==")[2] for package in PACKAGES)
    return home() / "triton" / f"venv-{pinned}"


def ensure_triton() -> Path:
    """The venv with tritonserver, tritonclient and ONNX Runtime, made the first time (half a minute).

    Raises `ServerFailed` with what is missing.
    """
    target = venv_dir()
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="making-") as making:
        venv = Path(making) / "venv"
        _run([_python(), "-m", "venv", str(venv)], "a venv for Triton cannot be made (Debian: python3-venv)")
        python = str(venv / "bin" / "python")
        pip = [python, "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check"]
        _run([*pip, *PACKAGES], "pip could not install Triton")
        stub = _tritonserver(venv) / "python_backend_stubs" / _version(python) / "triton_python_backend_stub"
        shutil.copy(stub, _tritonserver(venv) / "backends" / "python")
        try:
            # Its scripts name the old folder; its Python, which is all we run, does not.
            venv.rename(target)
        except OSError:
            # Somebody else made one meanwhile: theirs is as good.
            if not target.is_dir():
                raise
    return target


class LocalTriton(LocalServer):
    """The graphs of a released version, batched dynamically. `address` is that of gRPC.

    Models are called `tailrace-{graph}-{version}`, and are of version 1 as Triton numbers them.
    """

    name = "triton"

    def __init__(
        self,
        data_dir: Path,
        artefact: Artefact,
        *,
        port: int | None = None,
        queue_delay_us: int = 500,
        instances: int = 1,
    ) -> None:
        super().__init__(data_dir, port=port)
        self._artefact = artefact
        self._queue_delay_us = queue_delay_us
        self._instances = instances
        self._http_port = free_port()

    @property
    def http_address(self) -> str:
        return f"{HOST}:{self._http_port}"

    def _command(self) -> list[str]:
        venv = ensure_triton()
        server = _tritonserver(venv)
        models = self.data_dir / "models"
        shutil.rmtree(models, ignore_errors=True)
        for graph in GRAPHS:
            self._write(graph, models / f"tailrace-{graph}-{self._artefact.version}")
        libraries = server / "external_libs"
        told = {
            "LD_LIBRARY_PATH": f"{libraries}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":"),
            "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
            "VIRTUAL_ENV": str(venv),
            "PYTHONPATH": str(_packages(venv)),
        }
        return [
            *("env", "-u", "PYTHONHOME", *(f"{name}={value}" for name, value in told.items())),
            str(server / "bin" / "tritonserver"),
            f"--model-repository={models}",
            f"--backend-directory={server / 'backends'}",
            *(f"--grpc-address={HOST}", f"--grpc-port={self.port}"),
            *(f"--http-address={HOST}", f"--http-port={self._http_port}"),
            *("--allow-metrics=false", "--disable-auto-complete-config", "--exit-timeout-secs=5"),
        ]

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.http_address}/v2/health/ready", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _write(self, graph: Graph, folder: Path) -> None:
        (folder / "1").mkdir(parents=True)
        shutil.copy(MODEL, folder / "1" / "model.py")
        (folder / "1" / "graph.onnx").write_bytes(self._artefact.read(self._artefact.manifest.graphs[graph]))
        inputs, outputs = specs(graph, self._artefact.manifest.model)
        config = [
            f'name: "{folder.name}"',
            'backend: "python"',
            f"max_batch_size: {MAX_BATCH}",
            f"dynamic_batching {{ max_queue_delay_microseconds: {self._queue_delay_us} }}",
            f"instance_group [ {{ kind: KIND_CPU count: {self._instances} }} ]",
            *(_tensor("input", spec) for spec in inputs),
            *(_tensor("output", spec) for spec in outputs),
        ]
        (folder / "config.pbtxt").write_text("\n".join(config) + "\n")


def _tensor(kind: str, spec: TensorSpec) -> str:
    """Without the batch's dimension, which Triton adds; where nothing is left, a column stands for it."""
    sizes = ", ".join(map(str, spec.shape[1:]))
    shape = f"dims: [ {sizes} ]" if sizes else "dims: [ 1 ] reshape { shape: [ ] }"
    return f'{kind} [ {{ name: "{spec.name}" data_type: {_TYPES[spec.datatype]} {shape} }} ]'


def _python() -> str:
    for candidate in _PYTHONS:
        path = shutil.which(candidate)
        if path and (version := _version(path)) in _STUBS and ctypes.util.find_library(f"python{version}"):
            return path
    raise ServerFailed(
        f"Triton needs one of Python {', '.join(_STUBS)} with its shared library: "
        "apt-get install python3 python3-venv libpython3.11"
    )


def _version(python: str) -> str:
    script = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def _packages(venv: Path) -> Path:
    return next(venv.glob("lib/python3.*/site-packages"))


def _tritonserver(venv: Path) -> Path:
    return _packages(venv) / "pytriton" / "tritonserver"


def _run(command: list[str], what: str) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise ServerFailed(f"{what}:\n{(ran.stdout + ran.stderr)[-2000:]}")
