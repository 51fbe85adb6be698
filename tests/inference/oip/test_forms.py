"""Requests that are like one before but for their numbers: what is found out once holds for the numbers only
when they are looked at again."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from compression.registry import Artefact
from inference import engines
from inference.engines.base import Engine
from inference.errors import InvalidRequest
from inference.oip import open_inference_pb2 as pb
from inference.oip.client import Client
from inference.oip.forms import Forms
from tests.inference.oip.conftest import Running, rank_inputs

PATH = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture(scope="module")
def engine(artefact: Artefact) -> Iterator[Engine]:
    engine = engines.create("onnx")
    engine.load(artefact)
    yield engine
    engine.close()


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
        inputs = rank_inputs(1, 7, 5)
        request = pb.ModelInferRequest(
            model_name="tailrace-rank",
            id=request_id,
            inputs=[
                pb.ModelInferRequest.InferInputTensor(name=name, datatype="INT32", shape=array.shape)
                for name, array in inputs.items()
            ],
            raw_input_contents=[array.tobytes() for array in inputs.values()],
        )
        return bytes(request.SerializeToString())

    async with grpc.aio.insecure_channel(running.grpc) as channel:
        ask = channel.unary_unary(PATH)
        for request_id in ("first", "other", "first", "third"):
            answer = pb.ModelInferResponse.FromString(await ask(message(request_id)))
            assert answer.id == request_id


def test_forms_kept_are_bounded_and_a_cut_message_has_none() -> None:
    forms = Forms()
    assert forms.find(b"") is None
    assert forms.find(b"\x0a\x03abc") is None
