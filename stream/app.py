"""The Faust rim: the app, its agents and the service that feeds them.

Faust gives lifecycle, agents, channels and the consumer of `model-releases`. It does not see single
clicks: units arrive on in-memory channels (`stream.feeder`).
"""

from __future__ import annotations

from typing import Any

import faust
from faust.channels import Channel
from mode import Service
from mode.utils.queues import FlowControlEvent, ThrowableQueue

from features.settings import FeatureSettings
from inference.admission.settings import AdmissionSettings
from inference.settings import InferenceSettings
from stream.agents import releases, units
from stream.feeder import HandOver
from stream.resources import Resources
from stream.settings import StreamSettings
from stream.work import Unit

# Two units may wait for an agent; more would be a queue nobody counts.
CHANNEL_UNITS = 2


class _App(faust.App):
    """Without tables there is nothing to keep on disk, so no folders are made."""

    def _create_directories(self) -> None:
        pass


class UnitChannel(Channel[Unit]):
    """A channel that Faust's flow control does not reach.

    Whenever the consumer of `model-releases` rebalances, Faust empties every channel under its flow
    control and cancels who waits to put: units would vanish unanswered and the feeder would end.
    """

    _queue: Any

    @property
    def queue(self) -> Any:
        if self._queue is None:
            always = FlowControlEvent(initially_suspended=False, loop=self.loop)
            self._queue = ThrowableQueue(maxsize=self.maxsize, flow_control=always)
        return self._queue


def create_app(
    stream: StreamSettings | None = None,
    features: FeatureSettings | None = None,
    inference: InferenceSettings | None = None,
    admission: AdmissionSettings | None = None,
) -> faust.App:
    """A Faust app that serves clicks, requests and releases. `app.resources` is what it holds open."""
    stream = stream or StreamSettings()
    # Every worker must hear of every release, so each is a consumer group of its own there; the hot
    # topics share `stream.group` (and an id that differs, or Kafka refuses the mix of protocols).
    app = _App(
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
    )
    resources = Resources(stream, features or FeatureSettings(), inference or InferenceSettings(), admission)
    app.resources = resources
    names = stream.topics
    for name, take in ((names.clicks, resources.path.clicks), (names.requests, resources.path.requests)):
        channel = UnitChannel(app, maxsize=CHANNEL_UNITS)
        app.agent(channel, name=name)(units.agent(take))
        resources.hand_over[name] = into(channel)
    announced = app.topic(names.releases, key_type=bytes, value_type=bytes, internal=True)
    app.agent(announced, name=names.releases)(releases.agent(resources, stream.alias))

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


def into(channel: Any) -> HandOver:
    async def hand_over(unit: Unit) -> None:
        # Not `send`: it wraps the unit in an event, and a stream skips events while Faust rebalances.
        await channel.put(unit)

    return hand_over
