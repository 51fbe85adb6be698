"""A small world for the request path: memory for Redis, a list for Kafka, arithmetic for the model."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson

from features.memory_store import MemoryStore
from features.sequence import unpack
from features.statistics import ItemStatistics
from inference.admission.settings import AdmissionSettings
from inference.errors import InferenceError
from inference.types import RankedList, RankRequest
from stream.delivery import Record, Undeliverable
from stream.metrics import StreamMetrics
from stream.recommend import RequestPath
from stream.resources import admission_of
from stream.settings import StreamSettings
from stream.work import Unit

NOW_S = 1_511_700_000


@dataclass(frozen=True)
class LogLine:
    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()
    timestamp: int = NOW_S * 1000


@dataclass
class Outbox:
    """Where records go instead of Kafka. `hold` keeps `send` waiting, as a slow broker would; of more
    than `most_bytes` of key, value and headers no record is taken."""

    sent: list[tuple[str, Record]] = field(default_factory=list)
    hold: asyncio.Event | None = None
    most_bytes: int | None = None

    async def send(self, topic: str, records: Sequence[Record]) -> None:
        if self.hold is not None:
            await self.hold.wait()
        if self.most_bytes is not None and any(size(record) > self.most_bytes for record in records):
            raise Undeliverable("too large")
        self.sent.extend((topic, record) for record in records)

    def bodies(self, topic: str) -> list[dict]:
        return [orjson.loads(record.value) for name, record in self.sent if name == topic]

    def records(self, topic: str) -> list[Record]:
        return [record for name, record in self.sent if name == topic]


def size(record: Record) -> int:
    parts = [record.key, record.value, *(value for _, value in record.headers)]
    return sum(len(part) for part in parts if part)


class NewestFirst:
    """A ranking whose list is the user's own history, newest first: what it saw can be read off it.
    It breaks over users in `poisonous`."""

    def __init__(self) -> None:
        self.asked: list[RankRequest] = []
        self.error: InferenceError | None = None
        self.poisonous: set[int] = set()

    async def rank(self, requests: Sequence[RankRequest]) -> list[RankedList | InferenceError]:
        self.asked.extend(requests)
        if any(request.user_id in self.poisonous for request in requests):
            raise ZeroDivisionError("a bug")
        if self.error is not None:
            return [self.error] * len(requests)
        lists = []
        for request in requests:
            items = request.candidates or tuple(unpack([request.sequence]).items[::-1].tolist())
            items = [item for item in items if item not in request.exclude][: request.k]
            lists.append(
                RankedList(
                    items, [1.0 / (n + 1) for n in range(len(items))], ["recent"] * len(items), "v1", "test"
                )
            )
        return lists


class World:
    """A request path with everything it touches at hand."""

    def __init__(self, store=None, *, admission: AdmissionSettings | None = None, **settings) -> None:
        self.store = store or MemoryStore()
        self.statistics = ItemStatistics(self.store)
        self.ranking = NewestFirst()
        self.outbox = Outbox()
        self.released: list[Unit] = []
        stream = StreamSettings(instance_id="test", retry_min_ms=1, retry_max_ms=1, **settings)
        self.metrics = StreamMetrics()
        self.admission = admission_of(stream, admission or AdmissionSettings(shared=False))
        self.path = RequestPath(
            store=self.store,
            statistics=self.statistics,
            ranking=self.ranking,
            admission=self.admission,
            results=self.outbox,
            dead_letters=self.outbox,
            settings=stream,
            metrics=self.metrics,
            clock=lambda: float(NOW_S),
        )
        self._offsets = itertools.count()

    def click(self, user_id: int, item_id: int, **changes) -> LogLine:
        body = {
            "event_id": f"e{user_id}-{item_id}",
            "user_id": user_id,
            "item_id": item_id,
            "category_id": 1,
            "behavior": "pv",
            "timestamp": NOW_S - 10,
        }
        body.update(changes)
        return self.line(str(user_id).encode(), orjson.dumps(body))

    def line(self, key: bytes | None, value: bytes | None, *, topic: str = "clicks", headers=()) -> LogLine:
        return LogLine(topic, 0, next(self._offsets), key, value, headers)

    def unit(self, *records: LogLine, topic: str = "clicks") -> Unit:
        unit = Unit(topic, 7, records, asyncio.get_running_loop().time(), lambda: self.released.append(unit))
        return unit

    async def clicks(self, *records: LogLine) -> Unit:
        unit = self.unit(*records)
        await self.path.clicks(unit)
        await self.path.drain(5.0)
        return unit

    async def requests(self, *bodies: dict) -> Unit:
        records = [
            self.line(str(b.get("user_id", "")).encode(), orjson.dumps(b), topic="recommendation-requests")
            for b in bodies
        ]
        unit = self.unit(*records, topic="recommendation-requests")
        await self.path.requests(unit)
        await self.path.drain(5.0)
        return unit
