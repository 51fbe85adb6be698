"""The rival and the control: stock Faust as its guide shows it, run as a process of its own.

python -m infra.bench.stock_faust pass-through|rank BOOTSTRAP GROUP CONCURRENCY

`pass-through` decodes a click and sends its list on, without waiting for deliveries (which favours
stock Faust). `rank` adds an asynchronous step and awaits the delivery of each list before the stream
acknowledges the click. The step takes 1 to 3 ms, and now and then (1 in 500) 1 to 2 s, as a call does
that meets an engine's or a store's bad moment; the other agent instance goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import random
import sys
from typing import Any

import faust
import uvloop

from infra.bench.pass_through import LIST_HEADERS, list_value
from topics.catalog import CLICKS, RECOMMENDATIONS
from topics.codec import decode_click

HICCUPS = 1 / 500


def create_app(mode: str, bootstrap: str, group: str, concurrency: int) -> faust.App:
    app = faust.App(
        group,
        broker=f"aiokafka://{bootstrap}",
        store="memory://",
        value_serializer="raw",
        key_serializer="raw",
        web_enabled=False,
        topic_disable_leader=True,
        stream_buffer_maxsize=32_768,
        broker_commit_interval=1.0,
        consumer_auto_offset_reset="earliest",
        broker_session_timeout=10,
        consumer_group_instance_id=f"{group}-0",
        broker_heartbeat_interval=2,
        broker_request_timeout=30,
        producer_linger=0.002,
        producer_max_batch_size=131_072,
    )
    clicks = app.topic(CLICKS.name, key_type=bytes, value_type=bytes)
    lists = app.topic(RECOMMENDATIONS.name, key_type=bytes, value_type=bytes)
    rng = random.Random(1)

    async def pass_through(stream: Any) -> None:
        async for event in stream.events():
            click = decode_click(event.key, event.value)
            await lists.send(key=event.key, value=list_value(click, event.message), headers=LIST_HEADERS)

    async def rank(stream: Any) -> None:
        async for event in stream.events():
            click = decode_click(event.key, event.value)
            await asyncio.sleep(
                rng.uniform(1.0, 2.0) if rng.random() < HICCUPS else rng.uniform(0.001, 0.003)
            )
            value = list_value(click, event.message)
            sent = await lists.send(key=event.key, value=value, headers=LIST_HEADERS)
            await sent

    app.agent(clicks, name=mode, concurrency=concurrency)({"pass-through": pass_through, "rank": rank}[mode])
    return app


def main(mode: str, bootstrap: str, group: str, concurrency: str) -> None:
    loop = uvloop.new_event_loop()
    app = create_app(mode, bootstrap, group, int(concurrency))
    faust.Worker(
        app, loop=loop, loglevel="WARNING", quiet=True, redirect_stdouts=False, blocking_timeout=0.0
    ).execute_from_commandline()


if __name__ == "__main__":
    main(*sys.argv[1:])
