"""NVIDIA's client against our server, and our remote engine against NVIDIA's server."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compression.releases.registry import Artefact, Registry
from features.statistics import ItemStatistics
from inference import engines
from inference.engines.base import GRAPHS, TOLERANCE, EngineOptions, Shape
from inference.errors import EngineFailed, ModelUnavailable
from inference.ranker import Ranker
from infra.local.triton import LocalTriton
from tests.inference.oip.conftest import INFERENCE, Running, rank_inputs
from tests.inference.test_engine_parity import inputs
from tests.inference.test_ranker import lists, user

# Making the venv for the first time is part of the first test.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

CALLS = Path(__file__).parent / "calls_of_tritonclient.py"
VERSION = "20260101T000000-test"


def options(server: LocalTriton) -> EngineOptions:
    return EngineOptions(
        url=server.address, model="tailrace-{graph}-{version}", model_version="1", timeout_ms=5_000
    )


@pytest.fixture(scope="module")
def told(running: Running, triton_venv: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tritonclient heard from our server."""
    path = tmp_path_factory.mktemp("tritonclient") / "inputs.npz"
    np.savez(path, **rank_inputs(2, 6, 4))
    ran = subprocess.run(
        [triton_venv / "bin" / "python", CALLS, running.grpc, running.http, path, VERSION],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    answers: dict[str, Any] = json.loads(ran.stdout)
    return answers


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_tritonclient_calls_our_server_unchanged(
    protocol: str, told: dict[str, Any], artefact: Artefact
) -> None:
    engine = engines.create("onnx")
    engine.load(artefact)
    expected = engine.run("rank", rank_inputs(2, 6, 4))["scores"]
    engine.close()
    heard = told[protocol]
    np.testing.assert_allclose(heard["scores"], expected, atol=1e-4)
    assert (heard["live"], heard["ready"], heard["model"], heard["other"]) == (True, True, True, False)
    assert heard["server"] == "tailrace"
    assert heard["all"] == ["scores", "user_vector"]
    assert heard["inputs"][0] == "items"
    assert set(heard["index"]) >= {"tailrace-rank", "tailrace-lists"}
    assert sorted(heard["items"][0]) == [1070, 1077]


def test_tritonclient_reads_json_tensors_and_sends_compressed_ones(told: dict[str, Any]) -> None:
    heard = told["http"]
    np.testing.assert_allclose(heard["mixed"], heard["scores"], atol=1e-6)
    np.testing.assert_allclose(heard["gzip"], heard["scores"], atol=1e-6)


@pytest.mark.parametrize(
    ("fault", "grpc_status", "http_status"),
    [
        ("unknown model", "StatusCode.NOT_FOUND", "404"),
        ("unknown version", "StatusCode.NOT_FOUND", "404"),
        ("missing input", "StatusCode.INVALID_ARGUMENT", "400"),
        ("late", "StatusCode.DEADLINE_EXCEEDED", "504"),
        ("low priority", "StatusCode.INVALID_ARGUMENT", "400"),
    ],
)
def test_tritonclient_hears_the_status_and_a_sentence(
    fault: str, grpc_status: str, http_status: str, told: dict[str, Any]
) -> None:
    for protocol, status in (("grpc", grpc_status), ("http", http_status)):
        heard, sentence = told[protocol]["errors"][fault]
        assert heard == status
        assert len(sentence) > 10


def test_a_real_triton_computes_our_graphs(triton: LocalTriton, artefact: Artefact) -> None:
    local, remote = engines.create("onnx"), engines.create("remote", options(triton))
    local.load(artefact)
    remote.load(artefact)
    for graph in GRAPHS:
        for seed, (batch, history, candidates) in enumerate([(1, 4, 50), (5, 10, 7), (32, 70, 50)]):
            given = inputs(local, Shape(graph, batch, history, candidates), seed)
            expected, actual = local.run(graph, given), remote.run(graph, given)
            for name, output in expected.items():
                assert np.abs(output - actual[name]).max() <= TOLERANCE["f32"], (graph, name)
    wanted = remote.run_for("encode", inputs(local, Shape("encode", 2, 4, 0), 9), ["user_vector"])
    assert list(wanted) == ["user_vector"]
    local.close()
    remote.close()


def test_lists_ranked_through_a_real_triton_are_those_ranked_here(
    triton: LocalTriton, registry: Registry, statistics: ItemStatistics
) -> None:
    ranker = Ranker.open(registry.root, settings=INFERENCE)
    here, there = ranker.warm("onnx"), ranker.warm("remote", options(triton))
    requests = [user(number, length, k=20) for number, length in enumerate([1, 3, 10, 11, 70, 85])]
    expected = lists(ranker.rank(here, requests, statistics))
    # From several threads, so that Triton batches.
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ranker.rank(there, requests, statistics), range(8)))
    for answer in answers:
        for ours, theirs in zip(expected, lists(answer), strict=True):
            assert theirs.engine == "remote"
            assert theirs.items == ours.items
            assert theirs.scores == pytest.approx(ours.scores, abs=1e-4)
    here.close()
    there.close()


def test_a_triton_that_hangs_fails_the_call_in_time_and_serves_again(
    triton: LocalTriton, artefact: Artefact
) -> None:
    engine = engines.create("remote", options(triton))
    engine.load(artefact)
    given = inputs(engine, Shape("rank", 2, 4, 8), 1)
    expected = engine.run("rank", given)
    hasty = engines.create("remote", dataclasses.replace(options(triton), timeout_ms=300))
    hasty.load(artefact)
    triton.pause()
    try:
        with pytest.raises(EngineFailed, match="Deadline"):
            hasty.run("rank", given)
    finally:
        triton.resume()
    np.testing.assert_array_equal(hasty.run("rank", given)["scores"], expected["scores"])
    hasty.close()
    engine.close()


def test_a_model_that_triton_does_not_have_is_named(triton: LocalTriton, artefact: Artefact) -> None:
    engine = engines.create("remote", EngineOptions(url=triton.address, model_version="1"))
    with pytest.raises(ModelUnavailable, match="tailrace-encode"):
        engine.load(artefact)
    with pytest.raises(EngineFailed, match="no model"):
        engine.run("encode", {})
