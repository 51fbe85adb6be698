"""Tiers and admission in the server: who is refused, with which status, and when to come again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from aiohttp import ClientSession
from prometheus_client import CollectorRegistry

from compression.releases.registry import Registry
from features.memory_store import MemoryStore
from inference.admission.control import Admission
from inference.admission.settings import AdmissionSettings, Tier
from inference.admission.users import UserTiers
from inference.errors import DeadlineExceeded, InferenceError, NoRoom, Overloaded
from inference.oip import open_inference_pb2_grpc as pb_grpc
from inference.oip.client import Client
from inference.oip.gate import Gate, GateMetrics, admission_of
from inference.oip.messages import PUSHBACK, channel_of, request_of
from inference.types import RankedList, RankRequest, Tensors
from tests.inference.oip.conftest import Running, list_inputs, rank_inputs

FREE = Tier(name="free", client_rate=0.01, client_burst=3)
PAID = Tier(name="paid", rate=0.1, burst=5)
TOP = Tier(name="top")


def settings(*tiers: Tier, **more: Any) -> AdmissionSettings:
    return AdmissionSettings(
        tiers=tiers or (FREE, PAID, TOP), shared=False, **{"default_tier": "free", "lease_share": 1.0, **more}
    )


def store() -> MemoryStore:
    made = MemoryStore()

    async def fill() -> None:
        for user, tier in {20: "paid", 21: "paid", 30: "top"}.items():
            await made.set_tier(user, tier)

    asyncio.run(fill())
    return made


@pytest.fixture
def server(registry: Registry) -> Iterator[Running]:
    with Running(registry, admission=settings(), tiers=store()) as running:
        yield running


async def ask(client: Client, *users: int) -> None:
    await client.infer("tailrace-lists", list_inputs(len(users), 4, user_ids=np.array(users)))


async def test_a_users_rate_and_a_tiers_rate_hold_and_the_tier_is_the_stores(server: Running) -> None:
    async with Client(server.grpc) as client:
        for _ in range(3):
            await ask(client, 7)
        with pytest.raises(Overloaded, match="user's rate") as told:
            await ask(client, 7)
        assert told.value.retry_after_s == 100.0
        await ask(client, 8)
        # Of a tier without rates of its users, until the rate of the tier is used up.
        for _ in range(5):
            await ask(client, 20)
        with pytest.raises(Overloaded, match="tier's rate") as told:
            await ask(client, 21)
        assert told.value.retry_after_s == 10.0
        for _ in range(20):
            await ask(client, 30)
        # A priority in the request moves nobody into another tier.
        with pytest.raises(Overloaded):
            await client.infer("tailrace-lists", list_inputs(1, 4, user_ids=np.array([7])), priority=1)
    shed = server.server.metrics.get_sample_value
    assert shed("tailrace_serve_shed_total", {"reason": "client-rate", "tier": "free"}) == 2
    assert shed("tailrace_serve_shed_total", {"reason": "tier-rate", "tier": "paid"}) == 1


async def test_users_of_one_request_are_let_in_together_or_not_at_all(server: Running) -> None:
    async with Client(server.grpc) as client:
        for _ in range(4):
            with pytest.raises(Overloaded):
                await ask(client, 9, 9, 9, 9, 30)
        # Nothing of it was used up.
        await ask(client, 9, 9, 9)
        with pytest.raises(Overloaded):
            await ask(client, 9)


async def test_what_names_no_user_is_of_the_default_tier_and_has_no_user_to_limit(server: Running) -> None:
    async with Client(server.grpc) as client:
        for _ in range(6):
            await client.infer("tailrace-lists", list_inputs(1, 4))
            await client.infer("tailrace-rank", rank_inputs())
    with Running(server.registry, admission=settings(Tier(name="free", rate=0.1, burst=4), TOP)) as limited:
        async with Client(limited.grpc) as client:
            await client.infer("tailrace-rank", rank_inputs(3))
            with pytest.raises(Overloaded, match="tier's rate"):
                await client.infer("tailrace-rank", rank_inputs(2))
            await client.infer("tailrace-lists", list_inputs(1, 4))


async def test_both_protocols_say_when_to_come_again(server: Running) -> None:
    body = {
        "inputs": [
            {
                "name": name,
                "datatype": "INT32" if array.dtype.itemsize == 4 else "INT64",
                "shape": list(array.shape),
                "data": array.tolist(),
            }
            for name, array in list_inputs(1, 4, user_ids=np.array([5])).items()
        ]
    }
    async with ClientSession() as session:
        for status in (200, 200, 200, 429):
            async with session.post(
                f"http://{server.http}/v2/models/tailrace-lists/infer", json=body
            ) as response:
                assert response.status == status, await response.text()
        assert response.headers["Retry-After"] == "100"
    async with channel_of(server.grpc, blocking=False) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        inputs = list_inputs(1, 4, user_ids=np.array([5]))
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await stub.ModelInfer(request_of("tailrace-lists", "", inputs))
    assert told.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(told.value.trailing_metadata())[PUSHBACK] == "100000"


class Busy:
    """A gate before lists that are ranked when the test says so."""

    def __init__(self, **limits: Any) -> None:
        self.admission: Admission = admission_of(settings(Tier(name="free"), TOP, **limits), 8, None)
        self.counts = CollectorRegistry()
        users = UserTiers(None, self.admission.tiers, ttl_s=1, kept=10)
        self.gate = Gate(self.admission, users, GateMetrics(self.counts))
        self.release = asyncio.Event()
        self.outcome: InferenceError | None = None
        self.asked = 0
        self.lists = self.gate.lists(self._rank)

    async def _rank(
        self, requests: Sequence[RankRequest], known: bool
    ) -> Sequence[RankedList | InferenceError]:
        self.asked += 1
        await self.release.wait()
        if self.outcome is not None:
            raise self.outcome
        return [RankedList([1], [1.0], ["x"], "v", "e") for _ in requests]


def wanted(count: int = 1, **fields: Any) -> list[RankRequest]:
    return [RankRequest(user, None, tier=0, **fields) for user in range(count)]


async def test_beyond_the_ceiling_there_is_no_room_until_somebody_is_done() -> None:
    busy = Busy()
    asking = [asyncio.ensure_future(busy.lists(wanted(4), True)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(NoRoom) as told:
        await busy.lists(wanted(), True)
    assert (told.value.grpc_status, told.value.retry_after_s) == ("UNAVAILABLE", 0.5)
    busy.release.set()
    await asyncio.gather(*asking)
    assert len(await busy.lists(wanted(8), True)) == 8
    assert busy.admission.limit.in_flight == 0


async def test_who_goes_away_or_fails_makes_room() -> None:
    busy = Busy()
    leaving = asyncio.ensure_future(busy.lists(wanted(8), True))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    busy.outcome = Overloaded("full")
    busy.release.set()
    with pytest.raises(Overloaded, match="full"):
        await busy.lists(wanted(8), True)
    assert busy.admission.limit.in_flight == 0


async def test_graphs_share_the_room_with_lists() -> None:
    busy = Busy()

    async def run(question: Any) -> Tensors:
        await busy.release.wait()
        return {}

    class Question:
        inputs = {"lengths": np.zeros(6)}  # noqa: RUF012
        priority, deadline_s = "normal", None

    graph: Any = busy.gate.graph(run)
    first = asyncio.ensure_future(graph(Question))
    await asyncio.sleep(0)
    with pytest.raises(NoRoom):
        await graph(Question)
    second = asyncio.ensure_future(busy.lists(wanted(2), True))
    busy.release.set()
    await asyncio.gather(first, second)
    assert busy.admission.limit.in_flight == 0


async def test_waiting_lists_lower_the_limit_and_less_is_let_in() -> None:
    busy = Busy(floor=1)
    loop = asyncio.get_running_loop()
    asking = [asyncio.ensure_future(busy.lists(wanted(), True)) for _ in range(6)]
    await asyncio.sleep(0)
    for later_s in (1.0, 3.0, 9.0):
        busy.admission.update(loop.time() + later_s, lag_s=0.0, cpu=0.0)
    with pytest.raises(NoRoom):
        await busy.lists(wanted(), True)
    busy.release.set()
    await asyncio.gather(*asking)


async def test_less_time_than_a_list_takes_is_a_deadline() -> None:
    busy = Busy()
    past_s = asyncio.get_running_loop().time() - 1
    with pytest.raises(DeadlineExceeded):
        await busy.lists(wanted(deadline_s=past_s), True)
    assert busy.asked == 0
