"""Versions side by side, and the admin listener that loads and unloads them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from compression.releases.registry import Registry
from inference.errors import ModelNotFound, ModelUnavailable
from inference.oip import admin
from inference.oip.client import Client
from inference.oip.settings import ServeSettings
from tests.inference.oip.conftest import FIRST, SECOND, Running, rank_inputs


def test_versions_come_and_go_while_others_serve(two: Registry) -> None:
    with Running(two, max_versions=2) as running:
        running.run(_story, running)


async def _story(running: Running) -> None:
    async def version_of(asked: str = "") -> str:
        metadata = await client.metadata("tailrace-rank", asked)
        await client.infer("tailrace-rank", rank_inputs(), version=asked)
        return ",".join(metadata.versions)

    async with Client(running.grpc) as client:
        assert await version_of() == FIRST
        assert await running.post("/load", version=SECOND, sha256="0" * 64) == (
            503,
            {"error": _contains("announced with checksum")},
        )
        assert await running.post("/load", version=SECOND, serve=False) == (200, {"loaded": SECOND})
        assert running.server.catalogue.serving == FIRST
        assert await version_of(SECOND) == f"{FIRST},{SECOND}"
        assert await running.post("/unload", version=FIRST) == (400, {"error": _contains("serves")})
        assert await running.post("/load", version=SECOND) == (200, {"loaded": SECOND})
        assert running.server.catalogue.serving == SECOND
        asking = [client.infer("tailrace-rank", rank_inputs(), version=FIRST) for _ in range(20)]
        tasks = [asyncio.create_task(call) for call in asking]
        await asyncio.sleep(0)
        assert await running.post("/unload", version=FIRST) == (200, {"unloaded": FIRST})
        for answer in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(answer, dict | ModelNotFound)
        with pytest.raises(ModelNotFound, match=FIRST):
            await client.infer("tailrace-rank", rank_inputs(), version=FIRST)
        assert await version_of() == SECOND
        assert await running.post("/unload", version=FIRST) == (404, {"error": _contains("not loaded")})
        assert await running.post("/load", version=FIRST) == (200, {"loaded": FIRST})


class _contains(str):  # reads as an argument
    """Equal to every text that holds it."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str(self) in other

    __hash__ = str.__hash__


def app(host: str, token: str) -> web.Application:
    settings = ServeSettings(admin_host=host)
    return admin.make_app(None, CollectorRegistry(), settings, token)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "token", "sentence"),
    [
        ("0.0.0.0", "", admin.TOKEN_VARIABLE),
        ("192.168.1.5", "", admin.TOKEN_VARIABLE),
        ("example.org", "", admin.TOKEN_VARIABLE),
        ("::", "", admin.TOKEN_VARIABLE),
        ("127.0.0.1", "short", "16"),
        ("0.0.0.0", "short", "16"),
    ],
)
def test_an_admin_listener_is_not_opened_to_strangers(host: str, token: str, sentence: str) -> None:
    with pytest.raises(admin.AdminRefused, match=sentence):
        app(host, token)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_on_the_machine_itself_it_needs_no_token(host: str) -> None:
    app(host, "")


def test_a_registry_without_a_model_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="retrain"), Running(Registry(tmp_path)):
        pass
