"""The independent consumer: notes when each list arrived, and what it answers.

Runs as a process of its own, so that its clock readings do not wait for the generator's:
python -m infra.bench.collector BOOTSTRAP TOPIC OUT.npz
It writes OUT.npz when told to stop (SIGTERM), and a line per second to standard output.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType

import numpy as np
import orjson

from infra.clients import reader

DEGRADED = {None: 0, "cached": 1, "popular": 2}


class Collector:
    """Columns that grow: which click, when, under which id, how degraded."""

    def __init__(self) -> None:
        self.clicks: list[str] = []
        self.arrived_s: list[float] = []
        self.ids: list[str] = []
        self.degraded: list[int] = []
        self.wait_ms: list[float] = []
        self.rank_ms: list[float] = []

    def note(self, value: bytes, arrived_s: float) -> None:
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
    consumer = reader(bootstrap, topic, fetch_max_wait_ms=50, reconnect_backoff_max_ms=500)
    consumer.seek_to_beginning()
    collector = Collector()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    reported_s = time.monotonic()
    while not stopping:
        batches = consumer.poll(timeout_ms=100)
        # One clock reading per poll: the lists of a poll were all there by then, none is flattered.
        arrived_s = time.monotonic()
        for records in batches.values():
            for record in records:
                collector.note(record.value, arrived_s)
        if arrived_s - reported_s > 0.2:
            sys.stdout.write(f"{len(collector.clicks)}\n")
            sys.stdout.flush()
            reported_s = arrived_s
    collector.save(out)
    consumer.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
