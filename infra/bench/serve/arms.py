"""What is compared: rivals in environments of their own, our server, and no server at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from compression.releases.registry import Artefact
from inference.admission.load import processors
from inference.engines.base import EngineOptions, Precision
from infra.bench.serve.payload import Padding
from infra.bench.serve.shape import CANDIDATES, MAX_LISTS
from infra.bench.serve.venvs import CannotInstall, ensure
from infra.local.paths import INFRA
from infra.local.server import ServerFailed, free_port, free_ports
from infra.local.triton import LocalTriton, ensure_triton

WAIT_MS: Final = 2
# Shapes of our engines. The others compute batches of any size; what is warmed for more sizes pads less.
BATCHES: Final = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64)
HISTORIES: Final = (10, 25, 50, 75, 100)
# Room for everybody who is active at a time, 52 KiB each, 104 where candidates ask: ours keep what they know
# of users.
CACHE_MB: Final = 256
WIDTHS: Final = (CANDIDATES,)
_ONNXRUNTIME: Final = "onnxruntime==1.31.1"
_NUMPY: Final = "numpy==2.4.6"


@dataclass(frozen=True, slots=True)
class Served:
    """What a server is started with: the released version, and how it is asked."""

    registry: Path
    artefact: Artefact
    lists: int
    workers: int
    port: int
    folder: Path

    def told(self) -> dict[str, str]:
        """What `rivals.session` reads from the environment."""
        return {
            "RIVAL_MODEL": str(self.artefact.path / self.artefact.manifest.graphs["rank"]),
            "RIVAL_PORT": str(self.port),
            "RIVAL_WORKERS": str(self.workers),
            "RIVAL_MAX_BATCH": str(max(1, MAX_LISTS // self.lists)),
            "RIVAL_LISTS": str(self.lists),
            "RIVAL_WAIT_MS": str(WAIT_MS),
        }


@dataclass(frozen=True, slots=True)
class Arm(ABC):
    """One way to have lists ranked: its wire (`payload.WIRES`; none in process), HTTP's path or the model's
    name, and how its client pads histories: what it was found to be faster with (inference/LOG.md)."""

    name: str
    wire: str = ""
    path: str = "/"
    padding: Padding = "whole"
    cache_mb: float = 0.0
    """Of encoded histories, in a process."""

    def install(self) -> None:
        """Fetch what is missing; minutes the first time. Raises `CannotInstall`."""
        return

    def target(self, served: Served) -> str:
        return self.path

    @property
    def precision(self) -> Precision:
        """What it computes in: how far its scores may lie from ONNX Runtime's."""
        return "f32"

    @abstractmethod
    def start(self, served: Served) -> subprocess.Popen[bytes] | None:
        """The process that will answer at the port; None where there is none to start."""


@dataclass(frozen=True, slots=True)
class Rival(Arm):
    """A server script of `infra.bench.serve.rivals`, in an environment that holds the rival."""

    requirements: Sequence[str] = ()

    def install(self) -> None:
        self._python()

    def start(self, served: Served) -> subprocess.Popen[bytes]:
        module = f"infra.bench.serve.rivals.{self.name.replace('-', '_')}_server"
        return spawn_server([str(self._python()), "-m", module], served.folder, served.told())

    def _python(self) -> Path:
        return ensure(self.name, self.requirements)


@dataclass(frozen=True, slots=True)
class Triton(Arm):
    """Triton itself, our graphs in its Python backend: the wheel brings no other on the CPU."""

    def install(self) -> None:
        try:
            ensure_triton()
        except ServerFailed as error:
            raise CannotInstall(str(error)) from error

    def target(self, served: Served) -> str:
        return f"tailrace-rank-{served.artefact.version}"

    def start(self, served: Served) -> subprocess.Popen[bytes]:
        server = LocalTriton(
            served.folder,
            served.artefact,
            port=served.port,
            queue_delay_us=1000 * WAIT_MS,
            instances=served.workers,
        )
        return server.launch()


@cache
def our_precision() -> Precision:
    """bf16 where the processor has matrix units for it, which OpenVINO makes use of; else f32. Without such
    units ONNX Runtime serves more, although OpenVINO's batches alone take less (inference/LOG.md)."""
    from inference import engines
    from inference.errors import ModelUnavailable

    if "amx_bf16" not in _processor_flags():
        return "f32"
    try:
        engines.create("openvino", EngineOptions(precision="bf16")).close()
    except ModelUnavailable:
        return "f32"
    return "bf16"


def _processor_flags() -> frozenset[str]:
    """Empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(word for line in lines if line.startswith("flags") for word in line.split())


def our_lanes(count: int) -> str:
    """Of our arms, as INFERENCE_LANES has them."""
    return f"openvino*{count},precision=bf16" if our_precision() == "bf16" else f"onnx*{count}"


@dataclass(frozen=True, slots=True)
class OurServer(Arm):
    """`tailrace serve`, over gRPC: a process for each worker, which share a lane for every core."""

    @property
    def precision(self) -> Precision:
        return our_precision()

    def start(self, served: Served) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "infra.cli", "serve", "--registry", str(served.registry)]
        http_port = free_port(served.port)
        admin_port = free_ports(served.workers, served.port, http_port)
        ports = ["--grpc-port", str(served.port), "--http-port", str(http_port)]
        ports += ["--admin-port", str(admin_port)]
        workers = ["--workers", str(served.workers)]
        told = {
            "INFERENCE_LANES": our_lanes(max(1, processors() // served.workers)),
            "INFERENCE_SPARES": "0",
            # One version is open, as in the others.
            "SERVE_KEEP_PREVIOUS": "0",
            "INFERENCE_BATCHES": json.dumps(BATCHES),
            "INFERENCE_HISTORIES": json.dumps(HISTORIES),
            "INFERENCE_CANDIDATE_SIZES": json.dumps(WIDTHS),
            "INFERENCE_MAX_BATCH": str(MAX_LISTS),
            "INFERENCE_CACHE_MB": str(self.cache_mb),
        }
        return spawn_server([*command, *ports, *workers, "--log-level", "WARNING"], served.folder, told)


@dataclass(frozen=True, slots=True)
class NoServer(Arm):
    """The path of the stream: batcher and engines in the process that asks, with what is known of users
    kept or without."""

    @property
    def precision(self) -> Precision:
        return our_precision()

    def start(self, served: Served) -> None:
        return None


ARMS: Final[tuple[Arm, ...]] = (
    NoServer("in-process", cache_mb=CACHE_MB),
    NoServer("in-process-uncached"),
    OurServer("tailrace", "oip", "tailrace-rank", cache_mb=CACHE_MB),
    Rival("mosec", "raw", "/inference", requirements=("mosec==0.9.8", _ONNXRUNTIME, _NUMPY)),
    Triton("triton", "triton"),
    Rival("litserve", "raw", "/predict", requirements=("litserve==0.2.19", _ONNXRUNTIME, _NUMPY)),
    Rival("bentoml", "base64", "/rank", "bucket", requirements=("bentoml==1.4.40", _ONNXRUNTIME, _NUMPY)),
    Rival("ray-serve", "raw", "/", requirements=("ray[serve]==2.60.0", _ONNXRUNTIME, _NUMPY)),
)


def spawn_server(command: Sequence[str], folder: Path, told: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A server in a folder of its own, with its log there; modules of ours are found."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "server.log").open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(INFRA.parent), **told},
            start_new_session=True,
        )
