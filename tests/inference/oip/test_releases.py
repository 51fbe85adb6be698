"""Releases in the server: the alias moves, and users are answered by who should answer them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from aiohttp import ClientSession
from click.testing import CliRunner

from compression.releases.registry import Registry
from inference.oip import admin
from inference.oip import open_inference_pb2_grpc as pb_grpc
from inference.oip.messages import channel_of, request_of, tensors_of
from inference.releases.routing import Split
from infra.commands.models import models
from tests.inference.oip.conftest import (
    ADMIN_TOKEN,
    FIRST,
    SECOND,
    Running,
    list_inputs,
    rank_inputs,
)
from tests.support import eventually, eventually_async

USERS = range(1, 61)
# Beside busy processes a version is prepared late.
LATE_S = 90.0


@pytest.fixture
def server(two: Registry) -> Iterator[Running]:
    with Running(two, alias_poll_s=0.02) as running:
        yield running


class Asking:
    """Which version answers, over gRPC."""

    def __init__(self, running: Running) -> None:
        self._channel = channel_of(running.grpc, blocking=False)
        self._infer = pb_grpc.GRPCInferenceServiceStub(self._channel).ModelInfer

    async def __aenter__(self) -> Asking:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def lists(self, users: Sequence[int] | None, version: str = "") -> str:
        many = len(users or [1])
        inputs = list_inputs(many, 4, **({} if users is None else {"user_ids": np.array(users)}))
        answer = await self._infer(request_of("tailrace-lists", version, inputs), timeout=10)
        assert (tensors_of(answer)["counts"] == 10).all()
        return str(answer.model_version)

    async def graph(self) -> str:
        answer = await self._infer(request_of("tailrace-rank", "", rank_inputs()), timeout=10)
        return str(answer.model_version)

    async def each(self) -> dict[int, str]:
        versions = await asyncio.gather(*(self.lists([user]) for user in USERS))
        return dict(zip(USERS, versions, strict=True))


async def _models(running: Running) -> Any:
    async with (
        ClientSession(headers={"Authorization": f"Bearer {ADMIN_TOKEN}"}) as session,
        session.get(f"http://{running.admin}/releases") as response,
    ):
        return await response.json()


async def test_an_alias_that_moves_switches_the_server_and_fails_nobody(
    two: Registry, server: Running
) -> None:
    async with Asking(server) as asking:
        seen: list[str] = []
        failed: list[grpc.RpcError] = []
        stop = asyncio.Event()

        async def keep_asking() -> None:
            while not stop.is_set():
                try:
                    seen.append(await asking.lists([7]))
                    seen.append(await asking.graph())
                except grpc.RpcError as error:
                    failed.append(error)

        load = [asyncio.create_task(keep_asking()) for _ in range(3)]
        for change, expected in ((lambda: two.promote(SECOND), SECOND), (two.rollback, FIRST)) * 2:
            await asyncio.to_thread(change)
            await _only(seen, expected)
        stop.set()
        await asyncio.gather(*load)
    assert failed == []
    assert set(seen) == {FIRST, SECOND}


async def _only(seen: list[str], version: str) -> None:
    """Until the last dozen answers are of one version."""
    await eventually_async(lambda: set(seen[-12:]) == {version}, LATE_S, what=f"{version} answers")


async def test_a_canary_answers_its_users_by_hash_of_the_id_and_says_so(
    two: Registry, server: Running
) -> None:
    two.canary(SECOND, 50)
    chosen = Split.of(SECOND, 50).chosen(USERS, len(USERS))
    expected = {user: SECOND if of_canary else FIRST for user, of_canary in zip(USERS, chosen, strict=True)}
    async with Asking(server) as asking:
        await eventually_async(lambda: server.server.releases.describe()["canary"], LATE_S)
        assert await asking.each() == expected
        # Nobody's, and those that name a version, are not in the canary.
        assert {await asking.lists(None) for _ in range(4)} == {FIRST}
        assert await asking.graph() == FIRST
        assert await asking.lists(USERS[:8], version=FIRST) == FIRST
        assert await asking.lists(USERS[:8], version=SECOND) == SECOND
        arms = {version: [user for user in USERS if expected[user] == version] for version in (FIRST, SECOND)}
        assert await asking.lists(arms[SECOND][:4]) == SECOND
        assert await asking.lists([arms[FIRST][0], arms[SECOND][0]]) == f"{FIRST},{SECOND}"
        two.retire(SECOND)
        await eventually_async(lambda: not server.server.releases.describe()["canary"], LATE_S)
        assert set((await asking.each()).values()) == {FIRST}


async def test_a_shadow_is_compared_and_its_figures_are_told(two: Registry, server: Running) -> None:
    two.shadow(SECOND, 100)
    async with Asking(server) as asking:
        await eventually_async(lambda: server.server.releases.describe()["shadow"], LATE_S)
        assert set((await asking.each()).values()) == {FIRST}

        async def compared() -> bool:
            shadow = (await _models(server))["shadow"]
            return bool(shadow and shadow["compared"])

        await eventually_async(compared, LATE_S)
    figures = (await _models(server))["shadow"]
    assert (figures["version"], figures["overlap"], figures["failed"]) == (SECOND, 1.0, 0)


async def test_what_recent_lists_prove_unfit_does_not_serve(two: Registry, server: Running) -> None:
    async with Asking(server) as asking:
        await asking.each()
        file = two.root / "versions" / SECOND / "score.onnx"
        body = file.read_bytes()
        file.write_bytes(body[:-1])
        two.promote(SECOND)
        await eventually_async(lambda: server.server.releases.describe()["refused"], LATE_S)
        assert "score.onnx" in server.server.releases.describe()["refused"]["serving"]
        assert set((await asking.each()).values()) == {FIRST}
        file.write_bytes(body)
        # Told to look, it does not wait for the next change.
        status, told = await server.post("/refresh", version=SECOND, sha256=two.manifest_sha256(SECOND))
        assert (status, told["changed"], told["serving"]["version"]) == (200, True, SECOND)
        assert told["last_check"]["compared"] == 64
        assert set((await asking.each()).values()) == {SECOND}


def test_without_polling_only_those_who_are_told_look(two: Registry) -> None:
    with Running(two, alias_poll_s=0) as running:
        two.promote(SECOND)
        assert running.server.catalogue.serving == FIRST
        status, told = running.run(lambda: running.post("/refresh"))
        assert (status, told["serving"]["version"]) == (200, SECOND)
        assert running.server.catalogue.serving == SECOND


def test_a_version_by_hand_serves_until_the_alias_moves(two: Registry, server: Running) -> None:
    assert server.run(lambda: server.post("/load", version=SECOND)) == (200, {"loaded": SECOND})
    assert server.server.catalogue.serving == SECOND
    two.canary(SECOND, 1)
    eventually(lambda: server.server.catalogue.serving == FIRST)


def test_the_models_command_has_a_server_take_a_release_and_says_why_it_does_not(
    two: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Running(two, alias_poll_s=0) as running:

        def command(*words: str) -> tuple[int, str]:
            told = ["--registry", str(two.root), "--server", running.admin]
            answer = CliRunner().invoke(models, [*words, *told])
            return answer.exit_code, answer.output

        code, said = command("promote", SECOND)
        assert (code, "Authorization" in said) == (1, True)
        assert running.server.catalogue.serving == FIRST
        monkeypatch.setenv(admin.TOKEN_VARIABLE, ADMIN_TOKEN)
        assert command("promote", SECOND) == (0, f"serving now stands for {SECOND}\n")
        assert running.server.catalogue.serving == SECOND
        assert command("rollback")[0] == 0
        assert running.server.catalogue.serving == FIRST
        assert command("canary", SECOND, "--percent", "50")[0] == 0
        assert running.server.releases.describe()["canary"]["version"] == SECOND
