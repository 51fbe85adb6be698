"""Deadlines, cancellation, limits and the drain, on a model that answers when the test says so."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from aiohttp import ClientSession

from inference.errors import DeadlineExceeded, EngineFailed, InferenceError, ModelUnavailable, Overloaded
from inference.oip import open_inference_pb2_grpc as pb_grpc
from inference.oip import rest
from inference.oip.client import Client
from inference.oip.grpc_server import make_server
from inference.oip.listening import Http
from inference.oip.messages import request_of
from inference.oip.models import Answer, Catalogue, Question, TensorSpec
from inference.oip.service import Service
from inference.oip.settings import ServeSettings
from inference.types import Tensors
from tests.support import eventually_async

INPUTS = {"x": np.array([[1.0, 2.0]], np.float32)}
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}


class Held:
    """Doubles its input once `release` is set; notes what it was asked and what was given up."""

    name, version, platform = "held", "1", "test"
    inputs = (TensorSpec("x", "FP32", ("rows", "columns")),)
    outputs = (TensorSpec("y", "FP32", ("rows", "columns")),)
    most = {"rows": 4, "columns": 4}  # noqa: RUF012

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.asked: list[Question] = []
        self.given_up = 0
        self.answer: Tensors | InferenceError | None = None

    async def infer(self, question: Question) -> Answer:
        self.asked.append(question)
        try:
            if question.deadline_s is None:
                await self.release.wait()
            else:
                async with asyncio.timeout_at(question.deadline_s):
                    await self.release.wait()
        except TimeoutError:
            raise DeadlineExceeded("too late") from None
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        if isinstance(self.answer, InferenceError):
            raise self.answer
        return Answer(self.answer or {"y": 2 * question.inputs["x"]}, self.version)


class World:
    """Both fronts before a held model, on the test's own loop."""

    def __init__(self, model: Held, service: Service, grpc_url: str, http: str) -> None:
        self.model = model
        self.service = service
        self.grpc_url = grpc_url
        self.infer = f"{http}/v2/models/held/infer"
        self.client = Client(grpc_url)
        self.session = ClientSession()

    async def over_rest(self, **parameters: Any) -> tuple[int, str]:
        async with self.session.post(self.infer, json={**BODY, "parameters": parameters}) as response:
            return response.status, (await response.json()).get("error", "")

    async def asked(self, times: int) -> None:
        await eventually_async(lambda: len(self.model.asked) == times, what="the model is asked")


@pytest.fixture
async def world() -> AsyncIterator[World]:
    model, catalogue = Held(), Catalogue()
    catalogue.add([model])
    catalogue.serve("1")
    service = Service(catalogue, max_requests=2)
    service.ready = True
    settings = ServeSettings(max_requests=2, read_timeout_ms=200)
    server = make_server(service, settings)
    port = await server.start("127.0.0.1", 0)
    http = Http(rest.make_app(service, settings))
    await http.begin()
    http_port = await http.listen("127.0.0.1", 0)
    world = World(model, service, f"127.0.0.1:{port}", f"http://127.0.0.1:{http_port}")
    yield world
    model.release.set()
    await world.session.close()
    await world.client.close()
    await http.close()
    await server.stop(0)


async def test_a_deadline_is_kept_while_the_model_is_busy(world: World) -> None:
    with pytest.raises(DeadlineExceeded):
        await world.client.infer("held", INPUTS, timeout_s=0.05)
    assert (await world.over_rest(timeout=50_000))[0] == 504
    assert all(question.deadline_s is not None for question in world.model.asked)
    world.model.release.set()
    assert (await world.client.infer("held", INPUTS))["y"].tolist() == [[2, 4]]


async def test_the_earlier_of_transport_and_parameter_is_the_deadline(world: World) -> None:
    world.model.release.set()
    now_s = asyncio.get_running_loop().time()
    await world.client.infer("held", INPUTS, timeout_s=5.0)
    assert (await world.over_rest(timeout=7_000_000))[0] == 200
    assert (await world.over_rest())[0] == 200
    by_grpc, by_rest, without = (question.deadline_s for question in world.model.asked)
    assert by_grpc == pytest.approx(now_s + 5.0, abs=1.0)
    assert by_rest == pytest.approx(now_s + 7.0, abs=1.0)
    assert without is None


@pytest.mark.parametrize(
    ("number", "priority"), [(0, "normal"), (1, "high"), (2, "normal"), (3, "low"), (10, "low")]
)
async def test_a_lower_number_comes_first(world: World, number: int, priority: str) -> None:
    world.model.release.set()
    await world.client.infer("held", INPUTS, priority=number)
    assert (await world.over_rest(priority=number))[0] == 200
    assert [question.priority for question in world.model.asked] == [priority, priority]


async def test_a_client_that_goes_away_takes_its_work_with_it(world: World) -> None:
    asking = asyncio.create_task(world.client.infer("held", INPUTS))
    await world.asked(1)
    asking.cancel()
    await eventually_async(lambda: world.model.given_up == 1, what="the call is given up")
    posting = asyncio.create_task(world.over_rest())
    await world.asked(2)
    posting.cancel()
    await eventually_async(lambda: world.model.given_up == 2, what="the request is given up")
    assert world.service.requests == 0
    for task in (asking, posting):
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_one_request_too_many_is_refused_at_once_and_the_others_are_answered(world: World) -> None:
    both = [asyncio.create_task(world.client.infer("held", INPUTS)), asyncio.create_task(world.over_rest())]
    await world.asked(2)
    with pytest.raises(Overloaded, match="2 requests"):
        await world.client.infer("held", INPUTS)
    assert await world.over_rest() == (429, "2 requests are in hand already")
    assert await world.client.ready()
    world.model.release.set()
    answer, posted = await asyncio.gather(*both)
    assert answer["y"].tolist() == [[2, 4]]
    assert posted == (200, "")


async def test_a_body_that_never_comes_is_given_up(world: World) -> None:
    async def slowly() -> AsyncIterator[bytes]:
        yield b'{"inputs": '
        await asyncio.Event().wait()

    async with world.session.post(world.infer, data=slowly()) as response:
        assert response.status == 408


@pytest.mark.parametrize(
    ("answer", "kind", "status"),
    [
        ({"y": np.array([[np.nan]], np.float32)}, EngineFailed, 500),
        (EngineFailed("broken"), EngineFailed, 500),
        (Overloaded("full"), Overloaded, 429),
        (ModelUnavailable("gone"), ModelUnavailable, 503),
        ({}, EngineFailed, 500),
    ],
)
async def test_what_fails_inside_has_its_status(
    world: World, answer: Any, kind: type[InferenceError], status: int
) -> None:
    world.model.release.set()
    world.model.answer = answer or {"not": np.zeros(1, np.float32)}
    with pytest.raises(kind) as told:
        await world.client.infer("held", INPUTS)
    assert "Traceback" not in str(told.value)
    assert (await world.over_rest())[0] == status


async def test_a_server_that_is_not_ready_says_so_and_takes_nothing(world: World) -> None:
    world.service.ready = False
    assert not await world.client.ready()
    assert not await world.client.model_ready("held")
    with pytest.raises(ModelUnavailable, match="warming up"):
        await world.client.infer("held", INPUTS)
    assert (await world.over_rest())[0] == 503
    async with world.session.get(world.infer.replace("models/held/infer", "health/ready")) as response:
        assert response.status == 503
    async with world.session.get(world.infer.replace("models/held/infer", "health/live")) as response:
        assert response.status == 200


async def test_a_drain_waits_for_what_is_in_hand(world: World) -> None:
    asking = asyncio.create_task(world.client.infer("held", INPUTS))
    await world.asked(1)
    assert not await world.service.idle(0.01)
    draining = asyncio.create_task(world.service.idle(10.0))
    world.model.release.set()
    assert await draining
    assert (await asking)["y"].tolist() == [[2, 4]]


async def test_a_client_that_pings_all_the_time_is_sent_away_and_others_are_not(world: World) -> None:
    pings = {
        "grpc.keepalive_time_ms": 10,
        "grpc.keepalive_timeout_ms": 5_000,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.max_pings_without_data": 0,
        "grpc.use_local_subchannel_pool": 1,
    }
    async with grpc.aio.insecure_channel(world.grpc_url, list(pings.items())) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await stub.ModelInfer(request_of("held", "", INPUTS), timeout=10)
    assert told.value.code() is grpc.StatusCode.UNAVAILABLE
    assert await world.client.ready()


async def _raw(port: int, asked: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(asked)
    return reader, writer


LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"


async def test_a_connection_too_many_reads_a_503_and_the_others_go_on(world: World) -> None:
    app = rest.make_app(world.service, ServeSettings())
    http = Http(app, most=2)
    await http.begin()
    port = await http.listen("127.0.0.1", 0)
    try:
        first, second = [await _raw(port, LIVE) for _ in range(2)]
        for reader, _ in (first, second):
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        for asked in (LIVE, b"POST / HTTP/1.1\r\nContent-Length: 100000\r\n\r\n" + b"x" * 50_000):
            reader, writer = await _raw(port, asked)
            told = await reader.read()
            assert told.startswith(b"HTTP/1.1 503")
            assert b"Retry-After: 1" in told
            assert b"as many connections" in told
            writer.close()
        first[1].write(LIVE)
        await first[0].readuntil(b"HTTP/1.1 200 OK\r\n")
        second[1].close()

        async def served() -> bool:
            reader, writer = await _raw(port, LIVE)
            line = await reader.readline()
            writer.close()
            return b"200" in line

        await eventually_async(served)
        first[1].close()
    finally:
        await http.close()


@pytest.mark.parametrize("asked", [b"", b"GET /v2/health", LIVE])
async def test_a_connection_that_asks_nothing_more_is_closed(world: World, asked: bytes) -> None:
    app = rest.make_app(world.service, ServeSettings())
    http = Http(app, idle_s=0.05)
    await http.begin()
    port = await http.listen("127.0.0.1", 0)
    try:
        reader, writer = await _raw(port, asked)
        async with asyncio.timeout(5):
            await reader.read()
        writer.close()
    finally:
        await http.close()


async def test_grpc_has_a_limit_of_connections_too(world: World) -> None:
    server = make_server(world.service, ServeSettings(max_connections=1))
    port = await server.start("127.0.0.1", 0)
    try:
        async with Client(f"127.0.0.1:{port}") as first:
            assert await first.ready()
            async with Client(f"127.0.0.1:{port}", timeout_s=1.0) as second:
                with pytest.raises(InferenceError):
                    await second.ready()
            assert await first.ready()

        async def served() -> bool:
            async with Client(f"127.0.0.1:{port}", timeout_s=1.0) as client:
                with contextlib.suppress(InferenceError):
                    return await client.ready()
                return False

        await eventually_async(served)
    finally:
        await server.stop(0)


async def test_when_to_come_again_is_said_where_nothing_was_let_in(world: World) -> None:
    both = [asyncio.create_task(world.client.infer("held", INPUTS)) for _ in range(2)]
    await world.asked(2)
    with pytest.raises(Overloaded) as told:
        await world.client.infer("held", INPUTS)
    assert told.value.retry_after_s == 0.1
    async with world.session.post(world.infer, json=BODY) as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "1")
    world.model.release.set()
    await asyncio.gather(*both)
    world.service.ready = False
    async with world.session.post(world.infer, json=BODY) as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "1")


async def test_bodies_that_are_being_read_are_bounded_together(world: World) -> None:
    app = rest.make_app(world.service, ServeSettings(max_unfinished_bytes=60_000))
    http = Http(app)
    await http.begin()
    port = await http.listen("127.0.0.1", 0)
    begun = (
        b"POST /v2/models/held/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"x" * 40_000
    )
    try:
        readers, writers = zip(*[await _raw(port, begun) for _ in range(2)], strict=True)
        answers = [asyncio.ensure_future(reader.readline()) for reader in readers]
        # The one that is second is told at once; the first may go on.
        done, going = await asyncio.wait(answers, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        assert [answer.result() for answer in done] == [b"HTTP/1.1 429 Too Many Requests\r\n"]
        (first,) = going
        assert not first.done()
        writers[answers.index(first)].close()
        world.model.release.set()
        async with world.session.post(f"http://127.0.0.1:{port}/v2/models/held/infer", json=BODY) as answer:
            assert answer.status == 200
    finally:
        for task in answers:
            task.cancel()
        for writer in writers:
            writer.close()
        await http.close()
