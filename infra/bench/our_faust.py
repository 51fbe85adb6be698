"""Ours without ranking: the worker's feeder, agent, sequencer and delivery around a decode and a reply.

python -m infra.bench.our_faust BOOTSTRAP GROUP
"""

from __future__ import annotations

import sys
from typing import Any

import faust
from mode import Service

from infra.bench.pass_through import LIST_HEADERS, list_value, run_app
from stream.app import UnitChannel, into
from stream.delivery import Delivery, Record
from stream.feeder import Feeder
from stream.metrics import StreamMetrics
from stream.settings import StreamSettings
from topics.admin import topic_epoch
from topics.catalog import CLICKS, RECOMMENDATIONS, RELEASES
from topics.codec import decode_click


def create_app(bootstrap: str, group: str) -> faust.App:
    settings = StreamSettings(
        bootstrap=bootstrap,
        group=group,
        instance_id="pass-through",
        commit_interval_ms=1000,
        max_in_flight=8192,
        poll_max_records=2048,
    )
    app = faust.App(
        f"{group}-releases",
        broker=f"aiokafka://{bootstrap}",
        store="memory://",
        value_serializer="raw",
        web_enabled=False,
        topic_disable_leader=True,
    )
    channel = UnitChannel(app, maxsize=2)
    delivery = Delivery(bootstrap)

    async def pass_through(units: Any) -> None:
        async for unit in units:
            lists = [
                Record(record.key, list_value(decode_click(record.key, record.value), record), LIST_HEADERS)
                for record in unit.records
            ]
            await delivery.send(RECOMMENDATIONS.name, lists)
            unit.release()

    app.agent(channel, name="pass-through")(pass_through)

    async def releases(values: Any) -> None:
        async for _ in values:
            pass

    app.agent(app.topic(RELEASES.name, value_type=bytes), name="releases")(releases)

    class Feeding(Service):
        """What `stream.app` does with its resources, with nothing else in them."""

        async def on_start(self) -> None:
            await delivery.start()
            self.feeder = Feeder(
                settings=settings,
                epochs={CLICKS.name: topic_epoch(bootstrap, CLICKS.name)},
                hand_over={CLICKS.name: into(channel)},
                metrics=StreamMetrics(),
            )
            await self.feeder.start()
            self.add_future(self.feeder.run())
            self.add_future(self.feeder.commit_periodically())

        async def on_stop(self) -> None:
            await self.feeder.drain()
            await self.feeder.stop()
            await delivery.stop()

    app.service(Feeding)
    return app


def main(bootstrap: str, group: str) -> None:
    run_app(create_app(bootstrap, group))


if __name__ == "__main__":
    main(*sys.argv[1:])
