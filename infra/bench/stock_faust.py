"""The rival and the control: stock Faust as its guide shows it, run as a process of its own.

python -m infra.bench.stock_faust pass-through|rank BOOTSTRAP GROUP CONCURRENCY

`pass-through` decodes a click and sends its list on, without waiting for deliveries, in batches of up
to 20 ms, and logs nothing below warnings; each of the three favours stock Faust.

`rank` adds an asynchronous step and awaits the delivery of each list before the stream acknowledges
the click. The step takes 1 to 3 ms. One in a thousand hangs for 5 s, as a Redis call does that meets a
hung server under redis-py's default timeout, and then succeeds; the other agent instance goes on
meanwhile. Stock Faust commits every second here. Its second commit after a click began to hang passes
over that click (faust-streaming issue 606), so a kill between then and the end of the hang loses it.
Nothing else is arranged: hangs fall on random clicks and kills come at random moments.
"""

from __future__ import annotations

import asyncio
import random
import sys
from typing import Any

import faust
import uvloop

from infra.bench.pass_through import LIST_HEADERS, list_value, run_app
from topics.catalog import CLICKS, RECOMMENDATIONS
from topics.codec import decode_click

HANGS = 1 / 1000
HANG_S = 5.0
LINGER_S = {"pass-through": 0.02, "rank": 0.0}


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
        producer_linger=LINGER_S[mode],
        producer_max_batch_size=131_072,
    )
    clicks = app.topic(CLICKS.name, key_type=bytes, value_type=bytes)
    lists = app.topic(RECOMMENDATIONS.name, key_type=bytes, value_type=bytes)
    # Not seeded: a seed would repeat the same steps after every kill, and the first hang with them.
    rng = random.Random()

    async def pass_through(stream: Any) -> None:
        async for event in stream.events():
            click = decode_click(event.key, event.value)
            await lists.send(key=event.key, value=list_value(click, event.message), headers=LIST_HEADERS)

    async def rank(stream: Any) -> None:
        async for event in stream.events():
            click = decode_click(event.key, event.value)
            await asyncio.sleep(HANG_S if rng.random() < HANGS else rng.uniform(0.001, 0.003))
            value = list_value(click, event.message)
            sent = await lists.send(key=event.key, value=value, headers=LIST_HEADERS)
            await sent

    app.agent(clicks, name=mode, concurrency=concurrency)({"pass-through": pass_through, "rank": rank}[mode])
    return app


def main(mode: str, bootstrap: str, group: str, concurrency: str) -> None:
    # As `faust -L uvloop` does it: the consumer's thread gets one too.
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    run_app(create_app(mode, bootstrap, group, int(concurrency)))


if __name__ == "__main__":
    main(*sys.argv[1:])
