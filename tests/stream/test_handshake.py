"""A port that takes connections and never answers holds neither clients nor the worker up."""

from __future__ import annotations

import asyncio
import socket

import pytest
from aiokafka.errors import KafkaConnectionError

from stream import handshake
from stream.delivery import Delivery
from stream.feeder import Feeder
from stream.metrics import StreamMetrics
from stream.settings import StreamSettings


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr(handshake, "HANDSHAKE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


async def test_a_producer_gives_up_a_handshake_that_is_not_answered(silent):
    producer = Delivery(silent)
    with pytest.raises(KafkaConnectionError):
        await asyncio.wait_for(producer.start(), 20.0)
    await producer.stop()


async def test_a_consumer_gives_up_a_handshake_that_is_not_answered(silent):
    feeder = Feeder(
        settings=StreamSettings(bootstrap=silent), epochs={}, hand_over={}, metrics=StreamMetrics()
    )
    with pytest.raises(KafkaConnectionError):
        await asyncio.wait_for(feeder.start(), 20.0)
    await feeder.stop()
