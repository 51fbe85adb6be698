"""What a worker holds open: what may break without taking the worker along, and what its probes say."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from compression.releases.aliases import AliasState
from compression.releases.registry import Registry
from features.settings import FeatureSettings
from inference.plane import Plane
from inference.ranker import Ranker
from inference.settings import InferenceSettings
from stream.resources import Resources
from stream.settings import StreamSettings
from tests.support import eventually_async


@pytest.fixture
async def resources(tmp_path):
    stream = StreamSettings(instance_id="test", registry=str(tmp_path), flush_interval_ms=10)
    return Resources(stream, FeatureSettings(), InferenceSettings())


async def test_a_version_no_library_can_read_is_not_served_and_the_worker_goes_on(
    resources, monkeypatch, caplog
):
    def breaks(*_, **__):
        raise RuntimeError("protobuf parsing failed")

    state = AliasState(version="v2", manifest_sha256="0" * 64)
    monkeypatch.setattr(Registry, "state", lambda *_: state)
    monkeypatch.setattr(Plane, "_prepared", lambda *_: None)
    monkeypatch.setattr(Ranker, "open", breaks)
    await resources.load_model("v2")
    assert resources.model.version is None
    assert "protobuf parsing failed" in caplog.text


async def test_statistics_that_cannot_be_read_do_not_end_the_worker(resources, monkeypatch):
    reads = 0

    async def breaks() -> None:
        nonlocal reads
        reads += 1
        raise ValueError("buffer size must be a multiple of element size")

    monkeypatch.setattr(resources.statistics, "flush", breaks)
    monkeypatch.setattr(resources.statistics, "refresh", breaks)
    await resources._maintain_statistics_once()
    maintaining = asyncio.ensure_future(resources._maintain_statistics())
    await eventually_async(lambda: reads > 3)
    assert not maintaining.done()
    maintaining.cancel()


async def test_health_is_progress_except_while_redis_is_away(resources):
    stalled_s = 59.0
    resources.feeder = SimpleNamespace(stalled_s=lambda: stalled_s, in_flight=3, lag=7)
    assert resources.health() == {
        "healthy": True,
        "waits_for": None,
        "stalled_s": 59.0,
        "in_flight": 3,
        "lag": 7,
    }
    stalled_s = 61.0
    assert not resources.health()["healthy"]
    resources.path.waits_for_store = True
    assert resources.health()["healthy"]
    assert resources.health()["waits_for"] == "redis"
