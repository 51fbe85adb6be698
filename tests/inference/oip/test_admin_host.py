"""Without a token the admin listener answers those only who ask for this machine by a loopback address."""

from __future__ import annotations

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry

from inference.oip import admin
from inference.oip.settings import ServeSettings

TOKEN = "a token for the tests"


async def asked(host: str, token: str = "", **headers: str) -> int:
    """The status of GET /metrics with that Host."""
    app = admin.make_app(None, CollectorRegistry(), ServeSettings(), token)  # type: ignore[arg-type]
    async with TestClient(TestServer(app)) as client:
        return (await client.get("/metrics", headers={"Host": host, **headers})).status


@pytest.mark.parametrize("host", ["localhost:8002", "127.0.0.1:8002", "127.0.0.1", "[::1]:8002"])
async def test_a_loopback_address_is_answered(host: str) -> None:
    assert await asked(host) == 200


@pytest.mark.parametrize("host", ["rebound.example:8002", "127.0.0.1.rebound.example", "192.168.1.5:8002"])
async def test_a_name_that_was_bent_to_this_machine_is_not(host: str) -> None:
    assert await asked(host) == 403


async def test_with_a_token_any_name_will_do() -> None:
    assert await asked("inference.example", TOKEN, Authorization=f"Bearer {TOKEN}") == 200
    assert await asked("inference.example", TOKEN) == 401
