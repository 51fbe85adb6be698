"""A `tailrace worker` process of our own, for the demo, benchmarks and tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from infra.local.server import LocalServer

ROOT = Path(__file__).resolve().parents[2]


def spawn(module: str, *arguments: str, folder: Path, **options: Any) -> subprocess.Popen[Any]:
    """A module of ours as a process of its own, in a folder where what it leaves behind may lie."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, **options)


class LocalWorker(LocalServer):
    """Started when /readyz says so; `stop` drains, `kill` does not. `port` is that of its probes."""

    name = "worker"

    def __init__(
        self,
        data_dir: Path,
        *,
        bootstrap: str,
        redis_url: str,
        registry: Path,
        instance_id: str = "worker-0",
        group: str = "tailrace",
        topic_suffix: str = "",
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        super().__init__(data_dir, port=port)
        self._arguments = [
            *("--bootstrap", bootstrap, "--redis-url", redis_url, "--registry", str(registry)),
            *("--instance-id", instance_id, "--group", group, "--topic-suffix", topic_suffix),
            *options,
        ]
        self._environment = dict(environment or {})

    def readiness(self) -> dict[str, Any]:
        """What /readyz says, ready or not; empty where nothing listens."""
        return self._probe("/readyz")

    def health(self) -> dict[str, Any]:
        """What /healthz says; empty where nothing listens."""
        return self._probe("/healthz")

    def models(self) -> dict[str, Any]:
        """What /models says; empty where nothing listens."""
        return self._probe("/models")

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels, 0 where it has none yet."""
        with urllib.request.urlopen(f"http://{self.address}/metrics", timeout=5) as response:
            lines = response.read().decode().splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name
        )

    def cpu_s(self) -> float:
        """User and system seconds of the process and its children so far."""
        process = psutil.Process(self.pid)
        times = [process.cpu_times(), *(child.cpu_times() for child in process.children(recursive=True))]
        return float(sum(time.user + time.system for time in times))

    def memory_mb(self) -> float:
        """Resident memory of the process."""
        return float(psutil.Process(self.pid).memory_info().rss) / 2**20

    def _command(self) -> list[str]:
        # Through env(1), so that what this worker is told stays out of this process's environment.
        told = [f"{name}={value}" for name, value in {"PYTHONPATH": str(ROOT), **self._environment}.items()]
        worker = [sys.executable, "-m", "infra.cli", "worker", *self._arguments]
        return ["env", *told, *worker, "--http-port", str(self.port)]

    def _answers(self) -> bool:
        return bool(self.readiness().get("ready"))

    def _probe(self, path: str) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"http://{self.address}{path}", timeout=5) as response:
                body: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            body = json.load(error)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return {}
        return body
