"""A server of the tiny released version, on a loop in a thread of its own: any kind of client may call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from aiohttp import ClientSession

from compression.releases.registry import MANIFEST, Artefact, Registry
from features.memory_store import MemoryStore
from features.statistics import ItemStatistics
from inference import engines
from inference.admission.settings import AdmissionSettings
from inference.admission.users import TierStore
from inference.engines.base import Engine
from inference.oip.server import InferenceServer
from inference.oip.settings import ServeSettings
from inference.settings import InferenceSettings
from inference.types import Tensors
from infra.local.triton import LocalTriton, ensure_triton
from tests.inference.conftest import ITEMS, NOW_S

T = TypeVar("T")

INFERENCE = InferenceSettings(
    runners=1,
    spares=0,
    engine="onnx",
    histories=(10, 100),
    candidate_sizes=(8, 50),
    batches=(1, 4, 8),
    retrieved=40,
    spread_ms=0,
)
ADMIN_TOKEN = "a token for the tests"
FIRST, SECOND = "20260101T000000-test", "20260202T000000-test"
SERVE = {"grpc_port": 0, "http_port": 0, "admin_port": 0, "drain_timeout_ms": 5_000}


class Running:
    """A server, and a way to run coroutines where it runs."""

    def __init__(
        self,
        registry: Registry,
        *,
        admission: AdmissionSettings | None = None,
        tiers: TierStore | None = None,
        **settings: Any,
    ) -> None:
        self.registry = registry
        self._admission = admission
        self._tiers = tiers
        self._settings = ServeSettings(**{**SERVE, **settings})
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server")

    def __enter__(self) -> Running:
        self._thread.start()
        try:
            self.run(self._start)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "server"):
            self.run(self.server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, function: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
        """The result of a coroutine function, called on the server's loop."""
        return asyncio.run_coroutine_threadsafe(function(*arguments), self._loop).result(60)

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.server.ports.grpc}"

    @property
    def http(self) -> str:
        return f"127.0.0.1:{self.server.ports.http}"

    @property
    def admin(self) -> str:
        return f"127.0.0.1:{self.server.ports.admin}"

    async def post(self, path: str, **body: Any) -> tuple[int, Any]:
        """Status and answer of the admin listener."""
        async with (
            ClientSession(headers={"Authorization": f"Bearer {ADMIN_TOKEN}"}) as session,
            session.post(f"http://{self.admin}{path}", json=body) as response,
        ):
            return response.status, await response.json()

    async def _start(self) -> None:
        self.server = InferenceServer(
            self.registry.root,
            ItemStatistics(MemoryStore()),
            serve=self._settings,
            inference=INFERENCE,
            token=ADMIN_TOKEN,
            admission=self._admission,
            tiers=self._tiers,
        )
        await self.server.start()
        await self.server.load()


@pytest.fixture
def two(artefact: Artefact, tmp_path: Path) -> Registry:
    """A registry with the tiny version under two names; the first serves."""
    staging = tmp_path / "staging"
    staging.mkdir()
    for path in artefact.path.iterdir():
        if path.name != MANIFEST:
            (staging / path.name).write_bytes(path.read_bytes())
    registry = Registry(tmp_path / "models")
    for version in (FIRST, SECOND):
        registry.publish(staging, artefact.manifest.model_copy(update={"version": version}))
    registry.promote(FIRST)
    return registry


@pytest.fixture(scope="module")
def engine(artefact: Artefact) -> Iterator[Engine]:
    """The graphs of the tiny version, to compare with."""
    engine = engines.create("onnx")
    engine.load(artefact)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def running(registry: Registry) -> Iterator[Running]:
    with Running(registry) as running:
        yield running


def encode_inputs(users: int = 2, slots: int = 7, *, seed: int = 1) -> Tensors:
    """Inputs of `tailrace-encode`."""
    rng = np.random.default_rng(seed)
    shape = (users, slots)
    return {
        "items": rng.integers(1, 300, shape).astype(np.int32),
        "categories": rng.integers(1, 10, shape).astype(np.int32),
        "behaviors": rng.integers(1, 5, shape).astype(np.int32),
        "gaps": rng.integers(0, 32, shape).astype(np.int32),
        "lengths": np.full(users, slots, np.int32),
    }


def rank_inputs(users: int = 2, slots: int = 7, candidates: int = 5, *, seed: int = 1) -> Tensors:
    """Inputs of `tailrace-rank`."""
    rng = np.random.default_rng(seed)
    shape = (users, candidates)
    return {
        **encode_inputs(users, slots, seed=seed),
        "candidates": rng.integers(1, 300, shape).astype(np.int32),
        "candidate_categories": rng.integers(1, 10, shape).astype(np.int32),
    }


def list_inputs(users: int = 2, slots: int = 5, *, seed: int = 1, **more: Any) -> Tensors:
    """Inputs of `tailrace-lists`: users who viewed items of the catalogue, a minute apart."""
    items = np.random.default_rng(seed).choice(ITEMS, (users, slots))
    return {
        "items": items,
        "categories": 50 + items // 7 % 10,
        "behaviors": np.zeros((users, slots), np.int32),
        "timestamps": np.full((users, slots), NOW_S) + 60 * np.arange(slots),
        "lengths": np.full(users, slots, np.int32),
        **more,
    }


@pytest.fixture(scope="session")
def triton_venv() -> Path:
    """The venv of a real Triton and its clients, made the first time."""
    return ensure_triton()


@pytest.fixture(scope="session")
def triton(
    triton_venv: Path, artefact: Artefact, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalTriton]:
    """A real Triton with the graphs of the tiny version."""
    with LocalTriton(tmp_path_factory.mktemp("triton"), artefact) as server:
        yield server


@pytest.fixture(scope="session")
def small(registry: Registry) -> Iterator[Running]:
    """A server with low limits."""
    with Running(registry, max_message_bytes=1_000_000, max_json_bytes=10_000, max_requests=2) as running:
        yield running
