"""Requests that are like one before but for their numbers: what is found out once holds for the numbers only
when they are looked at again."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import grpc
import numpy as np
import pytest

from inference.engines.base import Engine
from inference.errors import InvalidRequest
from inference.oip import open_inference_pb2 as pb
from inference.oip.client import Client
from inference.oip.forms import Forms, mark
from inference.oip.grpc_server import OpenInference
from inference.oip.messages import request_of, tensors_of
from inference.oip.models import Answer, Catalogue, Question, TensorSpec
from inference.oip.service import Service
from tests.inference.oip.conftest import Running, rank_inputs

PATH = "/inference.GRPCInferenceService/ModelInfer"


class Doubling:
    """2 x, of numbers up to `most_x`."""

    name, platform = "doubling", "test"
    outputs = (TensorSpec("y", "INT32", ("rows", "columns")),)
    most = {"rows": 4, "columns": 4}  # noqa: RUF012

    def __init__(self, version: str, most_x: int) -> None:
        self.version = version
        self.inputs = (
            TensorSpec("x", "INT32", ("rows", "columns"), 0, most_x),
            TensorSpec("lengths", "INT32", ("rows",), 0, "columns"),
        )

    async def infer(self, question: Question) -> Answer:
        return Answer({"y": 2 * question.inputs["x"]}, self.version)


class World:
    def __init__(self) -> None:
        self.catalogue = Catalogue()
        self.load(Doubling("1", 9))
        service = Service(self.catalogue)
        service.ready = True
        self.server = OpenInference(service)

    def load(self, model: Doubling) -> None:
        self.catalogue.add([model])
        self.catalogue.serve(model.version)

    async def ask(self, message: bytes) -> Any:
        return pb.ModelInferResponse.FromString(await self.server.infer(message, None))

    async def doubled(self, *x: int, **told: Any) -> list[int]:
        answer = await self.ask(message(*x, **told))
        numbers: list[int] = tensors_of(answer)["y"][0].tolist()
        return numbers


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Messages that went through protobuf."""
    seen: list[bytes] = []

    class Watched:
        @staticmethod
        def FromString(content: bytes) -> Any:
            seen.append(content)
            return pb.ModelInferRequest.FromString(content)

    names = {name: getattr(pb, name) for name in dir(pb) if not name.startswith("_")}
    watched = type("Module", (), {**names, "ModelInferRequest": Watched})
    monkeypatch.setattr("inference.oip.grpc_server.pb", watched)
    return seen


def request(*x: int, length: int = 1) -> Any:
    inputs = {"x": np.array([x], np.int32), "lengths": np.array([length], np.int32)}
    return request_of("doubling", "", inputs, ("y",))


def message(*x: int, length: int = 1, request_id: str = "") -> bytes:
    asked = request(*x, length=length)
    asked.id = request_id
    return bytes(asked.SerializeToString())


async def test_the_same_form_with_other_numbers_has_the_answer_of_its_own_numbers(
    running: Running, engine: Engine
) -> None:
    async with Client(running.grpc) as client:
        for seed in range(6):
            asked = rank_inputs(2, 7, 5, seed=seed)
            answer = await client.infer("tailrace-rank", asked, ["scores"])
            np.testing.assert_allclose(answer["scores"], engine.run("rank", asked)["scores"], atol=1e-4)


async def test_numbers_out_of_range_are_refused_after_their_form_was_learned(running: Running) -> None:
    async with Client(running.grpc) as client:
        for _ in range(2):
            await client.infer("tailrace-rank", rank_inputs(2, 7, 5), ["scores"])
        for wrong in (-1, 2**31 - 1):
            asked = rank_inputs(2, 7, 5)
            asked["candidates"] = asked["candidates"].copy()
            asked["candidates"][1, 2] = wrong
            with pytest.raises(InvalidRequest, match="candidates"):
                await client.infer("tailrace-rank", asked, ["scores"])
        await client.infer("tailrace-rank", rank_inputs(2, 7, 5), ["scores"])


async def test_ids_of_one_length_are_not_mixed_up(running: Running) -> None:
    def message(request_id: str) -> bytes:
        request = request_of("tailrace-rank", "", rank_inputs(1, 7, 5), ())
        request.id = request_id
        return bytes(request.SerializeToString())

    async with grpc.aio.insecure_channel(running.grpc) as channel:
        ask = channel.unary_unary(PATH)
        for request_id in ("first", "other", "first", "third"):
            answer = pb.ModelInferResponse.FromString(await ask(message(request_id)))
            assert answer.id == request_id


def test_a_cut_message_has_no_form() -> None:
    forms = Forms()
    assert forms.find(b"") is None
    assert forms.find(b"\x0a\x03abc") is None


async def test_forms_kept_are_bounded(world: World, parsed: list[bytes]) -> None:
    for length in range(1, 66):
        await world.doubled(1, 2, request_id="x" * length)
    assert len(parsed) == 65
    await world.doubled(3, 4, request_id="x" * 65)
    assert len(parsed) == 65
    await world.doubled(3, 4, request_id="x")  # its form made room for a later one
    assert len(parsed) == 66


async def test_a_request_like_the_one_before_is_not_parsed(world: World, parsed: list[bytes]) -> None:
    assert await world.doubled(1, 2, 3) == [2, 4, 6]
    assert await world.doubled(4, 5, 6) == [8, 10, 12]
    assert len(parsed) == 1
    assert await world.doubled(4, 5) == [8, 10]  # another shape
    assert len(parsed) == 2


async def test_answers_say_whose_they_are(world: World) -> None:
    for request_id in ("a", "b", "a"):
        assert (await world.ask(message(1, 2, request_id=request_id))).id == request_id
    world.load(Doubling("2", 99))
    answer = await world.ask(message(1, 2))
    assert answer.model_version == "2"
    assert await world.doubled(1, 50) == [2, 100]
    world.load(Doubling("3", 9))
    with pytest.raises(InvalidRequest, match="9 is the most allowed"):
        await world.doubled(1, 50)


async def test_a_message_whose_contents_are_not_where_they_seem_has_no_form(world: World) -> None:
    """The same bytes once as contents and once, at the end, in a field that nobody knows."""
    asked = request(1, 2)
    tail = b"".join(mark(7, len(raw)) + raw for raw in asked.raw_input_contents)
    hidden = asked.SerializeToString() + mark(15, len(tail)) + tail
    for _ in range(2):
        assert tensors_of(await world.ask(hidden))["y"].tolist() == [[2, 4]]
    other = b"".join(mark(7, len(raw)) + raw for raw in request(3, 4).raw_input_contents)
    again = hidden.removesuffix(tail) + other
    assert tensors_of(await world.ask(again))["y"].tolist() == [[2, 4]]


async def test_what_has_been_unloaded_is_not_kept(world: World) -> None:
    await world.doubled(1, 2)
    gone = weakref.ref(world.catalogue.find("doubling"))
    world.load(Doubling("2", 9))
    world.catalogue.remove([world.catalogue.find("doubling", "1")])
    gc.collect()
    assert gone() is None
