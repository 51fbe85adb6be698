"""The remote engine against our own server, and against one that lies."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from compression.releases.registry import Artefact, Registry
from features.settings import FeatureSettings
from features.statistics import ItemStatistics
from inference import engines
from inference.engines.base import GRAPHS, Engine, EngineOptions, Shape, outputs_of
from inference.errors import EngineFailed, ModelUnavailable
from inference.oip import open_inference_pb2 as pb
from inference.oip import open_inference_pb2_grpc as pb_grpc
from inference.oip.graph_specs import specs
from inference.plane import Plane
from inference.settings import InferenceSettings
from inference.types import Graph, RankRequest
from tests.inference.conftest import ITEMS
from tests.inference.oip.conftest import INFERENCE, Running
from tests.inference.test_engine_parity import inputs

SHAPE = Shape("rank", 2, 4, 8)


class Liar(pb_grpc.GRPCInferenceServiceServicer):
    """Says it has every graph; what it answers is the test's."""

    def __init__(self, artefact: Artefact) -> None:
        self._shape = artefact.manifest.model
        self.answer: Callable[[Any], Any] = honest
        self.metadata: Callable[[Any], None] = lambda _: None
        self.ready = True
        self.asked: list[Any] = []
        self.held = threading.Event()

    def ModelReady(self, request: Any, context: Any) -> Any:
        return pb.ModelReadyResponse(ready=self.ready)

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        graph: Graph = request.name.removeprefix("tailrace-")
        taken, given = specs(graph, self._shape)
        metadata = pb.ModelMetadataResponse(name=request.name)
        for tensors, of in ((metadata.inputs, taken), (metadata.outputs, given)):
            for spec in of:
                tensors.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
        self.metadata(metadata)
        return metadata

    def ModelInfer(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        answer = self.answer(request)
        if isinstance(answer, grpc.StatusCode):
            context.abort(answer, "as the test wants it")
        return answer


def output(name: str, array: np.ndarray, **changed: Any) -> Any:
    answer = pb.ModelInferResponse()
    answer.outputs.add(name=name, datatype="FP32", shape=array.shape)
    answer.raw_output_contents.append(array.tobytes())
    for field, value in changed.items():
        if field == "shape":
            del answer.outputs[0].shape[:]
            answer.outputs[0].shape.extend(value)
        else:
            setattr(answer.outputs[0], field, value)
    return answer


def honest(request: Any) -> Any:
    return output("scores", np.ones((2, 8), np.float32))


@pytest.fixture
def liar(artefact: Artefact) -> Iterator[tuple[Liar, EngineOptions]]:
    liar = Liar(artefact)
    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_GRPCInferenceServiceServicer_to_server(liar, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield liar, EngineOptions(url=f"127.0.0.1:{port}", timeout_ms=5_000)
    liar.held.set()
    server.stop(None).wait()


@pytest.fixture
def remote(liar: tuple[Liar, EngineOptions], artefact: Artefact) -> Iterator[Engine]:
    engine = engines.create("remote", liar[1])
    engine.load(artefact)
    yield engine
    engine.close()


def test_it_answers_as_the_server_it_asks(running: Running, artefact: Artefact) -> None:
    local = engines.create("onnx")
    remote = engines.create("remote", EngineOptions(url=running.grpc, timeout_ms=5_000))
    local.load(artefact)
    remote.load(artefact)
    for graph in GRAPHS:
        for seed, (batch, history, candidates) in enumerate([(1, 1, 1), (5, 10, 7), (8, 70, 50)]):
            given = inputs(local, Shape(graph, batch, history, candidates), seed)
            expected, actual = local.run(graph, given), remote.run(graph, given)
            assert tuple(actual) == outputs_of(graph, local.model)
            seen = np.arange(history) < given["lengths"][:, None]
            for name in actual:
                difference = np.abs(expected[name] - actual[name])
                if name in local.model.state_names:
                    difference = difference * seen[..., None]  # padding is never read
                assert difference.max() <= 1e-4, (graph, name, batch)
    assert not remote.keeps_states
    remote.close()
    remote.close()
    with pytest.raises(EngineFailed, match="no model"):
        remote.run("rank", inputs(local, SHAPE, 1))
    local.close()


def test_a_plane_whose_lane_is_another_server_ranks_the_same_lists(
    running: Running, registry: Registry, statistics: ItemStatistics
) -> None:
    requests = [RankRequest(user, None, candidates=tuple(ITEMS[:5].tolist())) for user in range(20)]

    async def rank(lanes: str) -> list[Any]:
        settings = InferenceSettings(**{**INFERENCE.model_dump(), "lanes": lanes})
        plane = Plane(settings, FeatureSettings(), statistics)
        version = await plane.open(registry.root, "serving")
        answers = await plane.rank(requests, version)
        await plane.close()
        return answers

    here = running.run(rank, "onnx")
    there = running.run(rank, f"remote*2,url={running.grpc},region=far,hop_ms=1")
    for ours, theirs in zip(here, there, strict=True):
        assert (ours.engine, theirs.engine) == ("onnx", "remote")
        assert theirs.items == ours.items
        assert theirs.scores == pytest.approx(ours.scores, abs=1e-4)


def test_only_what_is_needed_is_asked_for(liar: tuple[Liar, EngineOptions], remote: Engine) -> None:
    assert list(remote.run_for("rank", inputs(remote, SHAPE, 1), ["scores"])) == ["scores"]
    (request,) = liar[0].asked
    assert [tensor.name for tensor in request.outputs] == ["scores"]
    assert request.parameters["timeout"].int64_param == 5_000_000


NAN = np.full((2, 8), np.nan, np.float32)
ONES = np.ones((2, 8), np.float32)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda _: output("scores", NAN), "not finite"),
        (lambda _: output("scores", ONES[:1]), r"float32\[1, 8\]"),
        (lambda _: output("scores", ONES[:, :7]), r"float32\[2, 7\]"),
        (lambda _: output("scores", ONES, datatype="INT32"), "int32"),
        (lambda _: output("scores", ONES, datatype="BYTES"), "BYTES"),
        (lambda _: output("scores", ONES, shape=(-2, -8)), "bytes for"),
        (lambda _: output("scores", ONES, shape=(2**40, 2**40)), "bytes for"),
        (lambda _: output("other", ONES), "no scores"),
        (lambda _: pb.ModelInferResponse(), "no scores"),
        (lambda _: pb.ModelInferResponse(raw_output_contents=[b""]), "1 raw contents"),
        (lambda _: grpc.StatusCode.INVALID_ARGUMENT, "as the test wants it"),
        (lambda _: grpc.StatusCode.RESOURCE_EXHAUSTED, "as the test wants it"),
        (lambda _: grpc.StatusCode.DATA_LOSS, "as the test wants it"),
    ],
)
def test_an_answer_that_is_wrong_is_an_engine_failure_and_the_engine_lives(
    liar: tuple[Liar, EngineOptions], remote: Engine, answer: Callable[[Any], Any], sentence: str
) -> None:
    liar[0].answer = answer
    given = inputs(remote, SHAPE, 1)
    with pytest.raises(EngineFailed, match=sentence):
        remote.run_for("rank", given, ["scores"])
    liar[0].answer = honest
    assert (remote.run_for("rank", given, ["scores"])["scores"] == 1).all()


def test_a_server_that_is_late_is_an_engine_failure(
    liar: tuple[Liar, EngineOptions], artefact: Artefact
) -> None:
    def late(request: Any) -> Any:
        liar[0].held.wait()
        return honest(request)

    hasty = engines.create("remote", dataclasses.replace(liar[1], timeout_ms=50))
    hasty.load(artefact)
    liar[0].answer = late
    with pytest.raises(EngineFailed, match="Deadline"):
        hasty.run_for("rank", inputs(hasty, SHAPE, 1), ["scores"])
    hasty.close()


def _without_scores(metadata: Any) -> None:
    del metadata.outputs[:]


def _wider(metadata: Any) -> None:
    next(tensor for tensor in metadata.outputs if tensor.name == "user_vector").shape[1] = 17


def _other_type(metadata: Any) -> None:
    metadata.inputs[0].datatype = "INT64"


def _one_more(metadata: Any) -> None:
    metadata.inputs.add(name="mood", datatype="FP32", shape=[-1])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_without_scores, "gives no user_vector"),
        (_wider, r"user_vector is FP32\[-1, 17\], not FP32\[-1, 16\]"),
        (_other_type, r"items is INT64\[-1, -1\], not INT32"),
        (_one_more, "mood"),
    ],
)
def test_another_model_under_our_name_is_not_loaded(
    liar: tuple[Liar, EngineOptions], artefact: Artefact, spoil: Callable[[Any], None], sentence: str
) -> None:
    liar[0].metadata = spoil
    with pytest.raises(ModelUnavailable, match=sentence):
        engines.create("remote", liar[1]).load(artefact)


def test_a_model_that_is_not_ready_is_not_loaded(
    liar: tuple[Liar, EngineOptions], artefact: Artefact
) -> None:
    liar[0].ready = False
    with pytest.raises(ModelUnavailable, match=f"tailrace-encode {artefact.version} is not ready"):
        engines.create("remote", liar[1]).load(artefact)


@pytest.mark.parametrize("url", ["127.0.0.1:1", "nowhere.invalid:8001", ""])
def test_a_server_that_is_not_there_is_a_sentence(artefact: Artefact, url: str) -> None:
    with pytest.raises(ModelUnavailable, match=url or "HOST:PORT"):
        engines.create("remote", EngineOptions(url=url)).load(artefact)
