"""The Faust rim: what Faust does to itself must not reach the units in hand."""

from __future__ import annotations

import asyncio

import pytest

from stream.app import CHANNEL_UNITS, create_app
from stream.settings import StreamSettings
from stream.work import Unit
from tests.support import eventually_async


@pytest.fixture
async def app():
    return create_app(StreamSettings(instance_id="test", registry="none"))


def a_unit() -> Unit:
    return Unit("clicks", 7, [], 0.0, lambda: None)


async def test_units_that_wait_survive_a_rebalance_of_the_releases_consumer(app):
    hand_over = app.resources.hand_over["clicks"]
    waiting = aiter(app.agents["clicks"].channel)
    units = [a_unit() for _ in range(CHANNEL_UNITS + 1)]
    for unit in units[:-1]:
        await hand_over(unit)
    held_up = asyncio.ensure_future(hand_over(units[-1]))
    await asyncio.sleep(0)
    # What `App._on_partitions_revoked` and the conductor do to every queue they know.
    app.flow_control.suspend()
    app.flow_control.clear()
    app.flow_control.resume()
    assert [await waiting.queue.get() for _ in units] == units
    await held_up


async def test_units_reach_the_agent_while_the_releases_consumer_is_stopped(app):
    app.flow_control.suspend()
    stream = app.agents["clicks"].channel.stream()
    agent = aiter(stream)
    reading = asyncio.ensure_future(anext(agent))
    await eventually_async(lambda: app.agents["clicks"].channel.subscriber_count)
    unit = a_unit()
    await asyncio.wait_for(app.resources.hand_over["clicks"](unit), 10.0)
    assert await asyncio.wait_for(reading, 10.0) is unit
    await agent.aclose()
    await stream.stop()


async def test_no_folder_is_made_where_the_worker_starts(app, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    await app.on_first_start()
    assert list(tmp_path.iterdir()) == []
