"""Open-loop load: clicks are sent when they are due, whether or not answers come.

Latency is counted from the intended time, so a service that stalls cannot hide it by slowing the
generator down (coordinated omission).
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from confluent_kafka import Producer

from infra.bench.collector import IMPATIENT
from infra.local.worker import spawn
from topics.codec import encode, record_key
from topics.messages import BehaviorEvent

MAX_UNSENT = 20_000
Record = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Sent:
    """When each click was due and when it was handed to the producer: monotonic seconds [n]."""

    intended_s: npt.NDArray[np.float64]
    actual_s: npt.NDArray[np.float64]

    @property
    def behind_p99_ms(self) -> float:
        """How far the generator itself ran behind. Past a millisecond or so the run says little."""
        return float(np.percentile(self.actual_s - self.intended_s, 99) * 1000) if len(self.actual_s) else 0.0


def records(events: Sequence[BehaviorEvent], *, first: int = 0) -> list[Record]:
    """Keys and values made beforehand; event n is named `first + n`, which a list repeats."""
    return [
        (record_key(event.user_id), encode(event.model_copy(update={"event_id": str(number)}))[0])
        for number, event in enumerate(events, first)
    ]


def poisson(count: int, rate: float, seed: int) -> npt.NDArray[np.float64]:
    """Offsets in seconds of `count` arrivals at `rate` a second; all zero at rate 0."""
    if not rate:
        return np.zeros(count)
    return np.cumsum(np.random.default_rng(seed).exponential(1.0 / rate, count))


def send(bootstrap: str, topic: str, clicks: Sequence[Record], due_s: npt.NDArray[np.float64]) -> Sent:
    """Send on schedule; returns when the broker has all of them."""
    client = Producer(
        {
            "bootstrap.servers": bootstrap,
            # As Java, aiokafka and kafka-python place keyed records; librdkafka's own way differs.
            "partitioner": "murmur2_random",
            "enable.idempotence": True,
            "linger.ms": 0 if due_s.any() else 5,
            "queue.buffering.max.messages": MAX_UNSENT,
            **IMPATIENT,
            "log_level": 2,
        }
    )
    client.list_topics(topic, timeout=30)
    failed: list[str] = []

    def delivered(error: Any, _: Any) -> None:
        if error is not None:
            failed.append(str(error))

    intended = time.monotonic() + 0.2 + due_s
    actual = np.zeros(len(clicks))
    for number, (key, value) in enumerate(clicks):
        wait_s = intended[number] - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)
        actual[number] = time.monotonic()
        while True:
            try:
                client.produce(topic, key=key, value=value, on_delivery=delivered)
                break
            except BufferError:
                client.poll(0.1)
        client.poll(0)
    left = client.flush(120)
    if left or failed:
        raise RuntimeError(f"{left + len(failed)} clicks were not delivered: {failed[:1]}")
    return Sent(intended, actual)


class Collecting:
    """The collector process as a context manager; `count` is how many lists it has seen."""

    def __init__(self, bootstrap: str, topic: str, folder: Path) -> None:
        self._out = folder / "collected.npz"
        told = (bootstrap, topic, str(self._out.resolve()))
        self._process = spawn(
            "infra.bench.collector", *told, folder=folder, stdout=subprocess.PIPE, text=True
        )
        self.count = 0
        self.changed_s = time.monotonic()
        self._ready = threading.Event()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def __enter__(self) -> Self:
        self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reading.join()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def wait(self, count: int, *, quiet_s: float, settle_s: float = 0.5, timeout_s: float = 600.0) -> None:
        """Until `count` lists are in and none has come for `settle_s`, or none has for `quiet_s`.

        Duplicates are counted too: where there may be some, `settle_s` is longer than what delays the
        last list.
        """
        self.changed_s = time.monotonic()
        end_s = self.changed_s + timeout_s
        while time.monotonic() < end_s:
            idle_s = time.monotonic() - self.changed_s
            if idle_s > quiet_s or (self.count >= count and idle_s > settle_s):
                return
            time.sleep(0.05)

    def finish(self) -> Collected:
        """Stop the collector and read what it noted."""
        self._process.terminate()
        self._process.wait(60)
        with np.load(self._out, allow_pickle=False) as arrays:
            return Collected(**{name: arrays[name] for name in arrays.files})

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == "ready":
                self._ready.set()
            elif int(line) != self.count:
                self.count = int(line)
                self.changed_s = time.monotonic()


@dataclass(frozen=True, slots=True)
class Collected:
    """Lists in order of arrival, one row per click they answer."""

    clicks: npt.NDArray[np.str_]
    arrived_s: npt.NDArray[np.float64]
    ids: npt.NDArray[np.str_]
    degraded: npt.NDArray[np.int8]
    wait_ms: npt.NDArray[np.float64]
    rank_ms: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Account:
    """What became of `clicks` clicks. A duplicate is a further list for a click; its id must be the first's.
    `ranked_again` are those that bring nothing new: a ranked list was there already."""

    clicks: int
    lists: int
    lost: int
    duplicated: int
    ranked_again: int
    other_ids: int
    degraded: int
    first_s: npt.NDArray[np.float64]  # arrival of the first list per click, NaN where lost

    @classmethod
    def of(cls, count: int, collected: Collected) -> Account:
        numbers = collected.clicks.astype(np.int64)
        first_s = np.full(count, np.nan)
        seen, first_rows = np.unique(numbers, return_index=True)
        first_s[seen] = collected.arrived_s[first_rows]
        ranked = numbers[collected.degraded == 0]
        pairs = np.unique(np.char.add(np.char.add(collected.clicks, "|"), collected.ids))
        return cls(
            clicks=count,
            lists=len(numbers),
            lost=count - len(seen),
            duplicated=len(numbers) - len(seen),
            ranked_again=len(ranked) - len(np.unique(ranked)),
            other_ids=len(pairs) - len(seen),
            degraded=int((collected.degraded > 0).sum()),
            first_s=first_s,
        )
