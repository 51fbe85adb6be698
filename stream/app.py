"""The Faust rim: the app, its agents and the service that feeds them.

Faust gives lifecycle, agents, channels and the consumer of `model-releases`. It does not see single
clicks: units arrive on in-memory channels (`stream.feeder`).
"""

from __future__ import annotations

from typing import Any

import faust
from mode import Service

from features.settings import FeatureSettings
from inference.settings import InferenceSettings
from stream.agents import clicks, releases, requests
from stream.feeder import HandOver
from stream.resources import Resources
from stream.settings import StreamSettings
from stream.work import Unit

# Two units may wait for an agent; more would be a queue nobody counts.
CHANNEL_UNITS = 2


def create_app(
    stream: StreamSettings | None = None,
    features: FeatureSettings | None = None,
    inference: InferenceSettings | None = None,
) -> faust.App:
    """A Faust app that serves clicks, requests and releases. `app.resources` is what it holds open."""
    stream = stream or StreamSettings()
    # Every worker must hear of every release, so each is a consumer group of its own there; the hot
    # topics share `stream.group` (and an id that differs, or Kafka refuses the mix of protocols).
    app = faust.App(
        f"{stream.group}-releases-{stream.instance_id}",
        broker=f"aiokafka://{stream.bootstrap}",
        store="memory://",
        value_serializer="raw",
        key_serializer="raw",
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        consumer_auto_offset_reset="latest",
        broker_session_timeout=10,
        broker_heartbeat_interval=2,
        broker_request_timeout=30,
        producer_request_timeout=15,
        processing_guarantee="at_least_once",
        datadir=None,
    )
    resources = Resources(stream, features or FeatureSettings(), inference or InferenceSettings())
    app.resources = resources
    names = stream.topics
    for name, agent in (
        (names.clicks, clicks.agent(resources.path)),
        (names.requests, requests.agent(resources.path)),
    ):
        channel = app.channel(maxsize=CHANNEL_UNITS)
        app.agent(channel, name=name)(agent)
        resources.hand_over[name] = _into(channel)
    announced = app.topic(names.releases, key_type=bytes, value_type=bytes, internal=True)
    app.agent(announced, name=names.releases)(releases.agent(resources))

    class Feeding(Service):
        """Holds the resources open and the tap running for as long as the app runs."""

        async def on_start(self) -> None:
            await resources.open()
            for task in resources.tasks():
                self.add_future(task)

        async def on_stop(self) -> None:
            await resources.close()

    app.service(Feeding)

    @app.on_before_shutdown.connect
    async def drain(*_: object, **__: object) -> None:
        # Sent before agents and services stop, so what is in hand is still answered.
        await resources.drain()

    return app


def _into(channel: Any) -> HandOver:
    async def hand_over(unit: Unit) -> None:
        await channel.send(value=unit)

    return hand_over
