"""The independent consumer: notes when each list arrived, and what it answers.

Runs as a process of its own, so that its clock readings do not wait for the generator's. librdkafka
does the fetching, so that measuring takes little of the machine that is measured.
python -m infra.bench.collector BOOTSTRAP TOPIC OUT.npz
It writes OUT.npz when told to stop (SIGTERM), and tells its count as it grows.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType

import numpy as np
import orjson
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

# A port that takes connections before its broker is there is given up soon: librdkafka would wait for a
# minute, and the measurement end before it.
IMPATIENT = {
    "reconnect.backoff.max.ms": 500,
    "socket.connection.setup.timeout.ms": 3_000,
    "api.version.request.timeout.ms": 3_000,
    "socket.timeout.ms": 5_000,
}
DEGRADED = {None: 0, "cached": 1, "popular": 2}


class Columns:
    """What lists say, one row per click answered: which click, when, under which id, how degraded."""

    def __init__(self) -> None:
        self.clicks: list[str] = []
        self.arrived_s: list[float] = []
        self.ids: list[str] = []
        self.degraded: list[int] = []
        self.wait_ms: list[float] = []
        self.rank_ms: list[float] = []

    def add(self, value: bytes, arrived_s: float) -> None:
        body = orjson.loads(value)
        timings = body.get("timings_ms", {})
        for click in body["trigger"]["clicks"]:
            self.clicks.append(click["event_id"])
            self.arrived_s.append(arrived_s)
            self.ids.append(body["recommendation_id"])
            self.degraded.append(DEGRADED[body.get("degraded")])
            self.wait_ms.append(timings.get("wait", 0.0))
            self.rank_ms.append(timings.get("rank", 0.0))

    def save(self, path: Path) -> None:
        np.savez(
            path,
            clicks=np.array(self.clicks, dtype=np.str_),
            arrived_s=np.array(self.arrived_s),
            ids=np.array(self.ids, dtype=np.str_),
            degraded=np.array(self.degraded, dtype=np.int8),
            wait_ms=np.array(self.wait_ms),
            rank_ms=np.array(self.rank_ms),
        )


def main(bootstrap: str, topic: str, out: Path) -> None:
    stopping = False

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    consumer = _consumer(bootstrap, topic)
    _say("ready")
    # Read when they arrive, understood when all is over: parsing would take time from the worker.
    arrivals: list[tuple[bytes, float]] = []
    told, told_s = 0, time.monotonic()
    while not stopping:
        message = consumer.poll(0.1)
        now_s = time.monotonic()
        if message is not None and message.error() is None:
            arrivals.append((message.value() or b"{}", now_s))
        if len(arrivals) > told and now_s - told_s > 0.2:
            told, told_s = len(arrivals), now_s
            _say(str(told))
    consumer.close()
    columns = Columns()
    for value, arrived_s in arrivals:
        columns.add(value, arrived_s)
    columns.save(out)


def _consumer(bootstrap: str, topic: str) -> Consumer:
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "tailrace-collector",
            "enable.auto.commit": False,
            "fetch.wait.max.ms": 100,
            **IMPATIENT,
            "log_level": 2,
        }
    )
    partitions = consumer.list_topics(topic, timeout=30).topics[topic].partitions
    consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in partitions])
    return consumer


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
