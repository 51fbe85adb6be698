"""Our client and plain HTTP against our server: what is served, and that it is what the engine says."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import orjson
import pytest
from aiohttp import ClientSession
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from compression.releases.registry import Registry
from inference.engines.base import Engine
from inference.errors import ModelNotFound
from inference.oip.client import Client
from inference.ranker import Ranker
from inference.types import RankRequest, Tensors
from infra.local import stubs
from tests.inference.conftest import ITEMS, sequence
from tests.inference.oip.conftest import (
    ADMIN_TOKEN,
    INFERENCE,
    Running,
    encode_inputs,
    list_inputs,
    rank_inputs,
)

VERSION = "20260101T000000-test"
MODELS = ["tailrace-encode", "tailrace-lists", "tailrace-rank", "tailrace-score"]
ADMIN = {"Authorization": f"Bearer {ADMIN_TOKEN}"}


def test_the_stubs_are_those_of_the_proto(tmp_path: Path) -> None:
    stubs.generate(tmp_path)
    for name in stubs.STUBS:
        generated = (tmp_path / stubs.PROTO.parent / name).read_text()
        assert generated == (stubs.ROOT / stubs.PROTO.parent / name).read_text(), (
            "python -m infra.local.stubs"
        )


async def test_graphs_answer_as_the_engine_does_in_the_shape_of_the_question(
    running: Running, engine: Engine
) -> None:
    async with Client(running.grpc) as client:
        ranked = rank_inputs(3, 7, 5)
        expected = engine.run("rank", ranked)
        answer = await client.infer("tailrace-rank", ranked)
        assert {name: array.shape for name, array in answer.items()} == {
            "scores": (3, 5),
            "user_vector": (3, 16),
        }
        for name, array in answer.items():
            np.testing.assert_allclose(array, expected[name], atol=1e-4)
        history = {name: ranked[name] for name in encode_inputs()}
        states = await client.infer("tailrace-encode", history)
        assert states["value_1"].shape == (3, 7, 16)
        candidates = {name: ranked[name] for name in ("lengths", "candidates", "candidate_categories")}
        scored = await client.infer("tailrace-score", {**states, **candidates}, ["scores"], version=VERSION)
        np.testing.assert_allclose(scored["scores"], expected["scores"], atol=1e-4)
        assert list(scored) == ["scores"]


async def test_many_clients_at_once_get_their_own_answers_from_shared_batches(
    running: Running, engine: Engine
) -> None:
    asked = [rank_inputs(1 + number % 3, 3 + number % 8, 4, seed=number) for number in range(40)]
    async with Client(running.grpc) as client:
        answers = await asyncio.gather(
            *(client.infer("tailrace-rank", inputs, ["scores"]) for inputs in asked)
        )
    for inputs, answer in zip(asked, answers, strict=True):
        np.testing.assert_allclose(answer["scores"], engine.run("rank", inputs)["scores"], atol=1e-4)


async def test_histories_of_any_length_share_batches_however_they_are_padded(
    running: Running, engine: Engine
) -> None:
    """What lies beyond a history, and how much of it, changes nothing."""
    longest = engine.model.max_history
    questions = []
    for number, slots in enumerate((longest, 1, longest, 7, longest // 2)):
        asked = rank_inputs(5, slots, 5, seed=number)
        asked["lengths"] = np.random.default_rng(number).integers(0, slots + 1, 5).astype(np.int32)
        asked["lengths"][0] = slots
        questions.append(asked)
    async with Client(running.grpc) as client:
        answers = await asyncio.gather(*(client.infer("tailrace-rank", asked) for asked in questions))
    for asked, answer in zip(questions, answers, strict=True):
        for name, array in engine.run("rank", asked).items():
            np.testing.assert_allclose(answer[name], array, atol=1e-4)


def test_lists_are_those_of_the_ranker(running: Running, registry: Registry, statistics: Any) -> None:
    histories = [ITEMS[[3, 50, 7]], ITEMS[[9, 11, 200]]]
    candidates = np.array([[*ITEMS[20:26]], [*ITEMS[30:34], -1, -1]])
    items = np.stack(histories)
    inputs = list_inputs(2, 3, items=items, categories=50 + items // 7 % 10, candidates=candidates)
    ranker = Ranker.open(registry.root, settings=INFERENCE)
    warmed = ranker.warm("onnx")
    requests = [
        RankRequest(0, sequence(history.tolist()), k=10, candidates=tuple(asked[asked >= 0].tolist()))
        for history, asked in zip(histories, candidates, strict=True)
    ]
    expected: list[Any] = ranker.rank(warmed, requests, statistics)
    warmed.close()

    async def ask() -> Tensors:
        async with Client(running.grpc) as client:
            return await client.infer("tailrace-lists", inputs)

    answer = running.run(ask)
    assert answer["counts"].tolist() == [6, 4]
    assert answer["items"].shape == (2, 10)
    for user, ranked in enumerate(expected):
        count = answer["counts"][user]
        assert answer["items"][user, :count].tolist() == ranked.items
        np.testing.assert_allclose(answer["scores"][user, :count], ranked.scores, atol=1e-4)
        assert (answer["items"][user, count:] == -1).all()


async def test_lists_find_their_own_candidates_for_as_many_as_asked(running: Running) -> None:
    inputs = list_inputs(3, 4, k=np.array([25], np.int32), user_ids=np.array([5, 6, 7]))
    async with Client(running.grpc) as client:
        answer = await client.infer("tailrace-lists", inputs, priority=1, timeout_s=5.0)
    assert answer["items"].shape == (3, 25)
    assert np.isin(answer["items"], ITEMS).all()
    assert (np.diff(answer["scores"], axis=1) <= 0).all()


async def test_a_wide_history_of_large_ids_is_ranked_too(running: Running) -> None:
    large = np.full((1, 2), 2**62)
    async with Client(running.grpc) as client:
        answer = await client.infer("tailrace-lists", list_inputs(1, 2, items=large, categories=large))
    assert answer["counts"][0] == 10


async def test_metadata_names_every_model_version_and_tensor(running: Running) -> None:
    async with Client(running.grpc) as client:
        assert await client.ready()
        assert sorted(await client.models()) == [(name, VERSION) for name in MODELS]
        assert await client.model_ready("tailrace-rank", VERSION)
        assert not await client.model_ready("tailrace-rank", "another")
        metadata = await client.metadata("tailrace-score")
        assert list(metadata.versions) == [VERSION]
        shapes = {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in metadata.inputs}
        assert shapes["key_0"] == ("FP32", [-1, -1, 16])
        assert shapes["candidates"] == ("INT32", [-1, -1])
        with pytest.raises(ModelNotFound, match="tailrace-rank"):
            await client.metadata("tailrace-nothing")


async def test_rest_serves_the_same_as_plain_json(running: Running, engine: Engine) -> None:
    inputs = rank_inputs(2, 6, 4)
    request = {
        "id": "the first",
        "inputs": [
            {"name": name, "datatype": "INT32", "shape": list(array.shape), "data": array.tolist()}
            for name, array in inputs.items()
        ],
        "outputs": [{"name": "scores"}],
        "parameters": {"priority": 2, "timeout": 5_000_000},
    }
    root = f"http://{running.http}/v2"
    async with ClientSession() as session:
        for path in ("/health/live", "/health/ready", "/models/tailrace-rank/ready"):
            async with session.get(root + path) as response:
                assert response.status == 200, path
        async with session.get(f"{root}/models/tailrace-rank/versions/{VERSION}") as response:
            metadata = await response.json()
            assert metadata["versions"] == [VERSION]
            assert {"name": "scores", "datatype": "FP32", "shape": [-1, -1]} in metadata["outputs"]
        async with session.get(root) as response:
            assert (await response.json())["name"] == "tailrace"
        async with session.post(f"{root}/models/tailrace-rank/infer", json=request) as response:
            assert response.status == 200, await response.text()
            answer = await response.json()
    assert (answer["id"], answer["model_version"]) == ("the first", VERSION)
    (scores,) = answer["outputs"]
    assert (scores["name"], scores["datatype"], scores["shape"]) == ("scores", "FP32", [2, 4])
    expected = engine.run("rank", inputs)["scores"]
    np.testing.assert_allclose(np.array(scores["data"]).reshape(2, 4), expected, atol=1e-4)


def test_reflection_tells_the_service(running: Running) -> None:
    with grpc.insecure_channel(running.grpc) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([asked]))
    names = {service.name for service in answer.list_services_response.service}
    assert "inference.GRPCInferenceService" in names


async def test_the_admin_listener_lists_and_wants_its_token(running: Running) -> None:
    root = f"http://{running.admin}"
    async with ClientSession() as session:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": ADMIN_TOKEN}):
            async with session.get(f"{root}/versions", headers=headers) as response:
                assert response.status == 401
        async with session.get(f"{root}/versions", headers=ADMIN) as response:
            (version,) = await response.json()
            assert (version["version"], version["serving"]) == (VERSION, True)
        async with session.get(f"{root}/metrics", headers=ADMIN) as response:
            assert "tailrace_inference_batch_items" in await response.text()
        for body, status in (
            ({"version": "nothing"}, 503),
            ({"version": VERSION, "extra": 1}, 400),
            ({"version": 5}, 400),
            ([], 400),
        ):
            async with session.post(f"{root}/load", headers=ADMIN, data=orjson.dumps(body)) as response:
                assert response.status == 415
            async with session.post(f"{root}/load", headers=ADMIN, json=body) as response:
                assert response.status == status, body
                assert (await response.json())["error"]
        async with session.post(f"{root}/unload", headers=ADMIN, json={"version": VERSION}) as response:
            assert response.status == 400
            assert "serves" in (await response.json())["error"]
