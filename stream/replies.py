"""What leaves the worker: ranked lists and dead letters as records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from inference.types import RankedList
from stream.delivery import Record
from stream.work import LogRecord
from topics.codec import SCHEMA_HEADER, SCHEMA_VERSION, record_key
from topics.messages import AnsweredClick, Degradation

LIST_HEADERS: Final = ((SCHEMA_HEADER, b"%d" % SCHEMA_VERSION),)
ATTEMPTS_HEADER: Final = "attempts"
DROPPED_HEADER: Final = "dropped"
OWN_HEADERS: Final = ("reason", "detail", "topic", "partition", "offset", ATTEMPTS_HEADER)


@dataclass(frozen=True, slots=True)
class Answer:
    """A list in the making: what it answers, and, once known, its items."""

    recommendation_id: str
    user_id: int
    k: int
    asked_at_s: float  # Unix seconds at which the triggering record was written
    clicks: tuple[AnsweredClick, ...] = ()
    request_id: str | None = None
    exclude: frozenset[int] = frozenset()
    candidates: tuple[int, ...] | None = None
    items: Sequence[int] = ()
    scores: Sequence[float] = ()
    sources: Sequence[str] = ()
    model_version: str = "none"
    engine: str = "none"
    degraded: Degradation | None = None
    timings_ms: dict[str, float] | None = None

    def ranked(self, outcome: RankedList, wait_ms: float) -> Answer:
        """The answer with a ranker's list in it."""
        timings_ms = {"wait": wait_ms, **outcome.timings_ms}
        return self._with(
            outcome.items,
            outcome.scores,
            outcome.sources,
            outcome.model_version,
            outcome.engine,
            None,
            timings_ms,
        )

    def given(
        self,
        degraded: Degradation,
        items: Sequence[int],
        scores: Sequence[float],
        sources: Sequence[str],
        *,
        model_version: str = "none",
        engine: str = "none",
    ) -> Answer:
        """The answer with a list that nobody ranked now: its k first that are not excluded."""
        if self.exclude:
            kept = [place for place, item in enumerate(items) if item not in self.exclude]
            items = [items[place] for place in kept]
            scores = [scores[place] for place in kept]
            sources = [sources[place] for place in kept]
        k = self.k
        return self._with(items[:k], scores[:k], sources[:k], model_version, engine, degraded, None)

    def _with(
        self,
        items: Sequence[int],
        scores: Sequence[float],
        sources: Sequence[str],
        model_version: str,
        engine: str,
        degraded: Degradation | None,
        timings_ms: dict[str, float] | None,
    ) -> Answer:
        # By hand: `dataclasses.replace` takes three times as long, and this is done for every list.
        return Answer(
            self.recommendation_id,
            self.user_id,
            self.k,
            self.asked_at_s,
            self.clicks,
            self.request_id,
            self.exclude,
            self.candidates,
            items,
            scores,
            sources,
            model_version,
            engine,
            degraded,
            timings_ms,
        )


def recommendation_id(topic: str, epoch: int, partition: int, offset: int) -> str:
    """The same record always gives the same id; a recreated topic (another epoch) gives others."""
    return f"{topic}-{epoch:08x}-{partition}-{offset}"


def reply(answer: Answer, now_s: float) -> Record:
    """The record of a `Recommendation`. Written as plain JSON: `tests/stream/test_replies.py` holds
    it equal to the message type, which costs five times as much to build."""
    trigger: dict[str, Any] = {"kind": "request" if answer.request_id else "click"}
    trigger["clicks"] = [
        {
            "event_id": click.event_id,
            "item_id": click.item_id,
            "topic": click.topic,
            "partition": click.partition,
            "offset": click.offset,
        }
        for click in answer.clicks
    ]
    if answer.request_id:
        trigger["request_id"] = answer.request_id
    body: dict[str, Any] = {
        "recommendation_id": answer.recommendation_id,
        "user_id": answer.user_id,
        "trigger": trigger,
        "items": [
            {"item_id": item, "score": score, "source": source}
            for item, score, source in zip(answer.items, answer.scores, answer.sources, strict=True)
        ],
        "model_version": answer.model_version,
        "engine": answer.engine,
        "timings_ms": {name: round(ms, 3) for name, ms in (answer.timings_ms or {}).items()},
        "generated_at": now_s,
    }
    if answer.degraded:
        body["degraded"] = answer.degraded
    return Record(record_key(answer.user_id), orjson.dumps(body), LIST_HEADERS)


def dead_letter(record: LogRecord, *, reason: str, detail: str) -> Record:
    """The record with its key and bytes untouched, and headers that say what was wrong with it.

    Headers of the original are kept; `attempts` counts how often it has come here (a replay carries
    the count along).
    """
    attempts = 1
    kept: list[tuple[str, bytes | None]] = []
    for name, value in record.headers:
        if name == ATTEMPTS_HEADER:
            # A header's value may be null.
            attempts = int(value) + 1 if value and value.isdigit() and len(value) < 9 else 1
        elif name not in OWN_HEADERS:
            kept.append((name, value))
    return Record(
        record.key,
        record.value,
        [
            *kept,
            ("reason", reason.encode()),
            ("detail", detail.encode()[:1_000]),
            ("topic", record.topic.encode()),
            ("partition", b"%d" % record.partition),
            ("offset", b"%d" % record.offset),
            (ATTEMPTS_HEADER, b"%d" % attempts),
        ],
    )


def without_value(letter: Record) -> Record:
    """The letter with a header in the place of a value that no broker takes."""
    return letter._replace(value=None, headers=[*letter.headers, (DROPPED_HEADER, b"value")])


def place_only(letter: Record) -> Record:
    """What is always small enough: the reason, and where the original lies in its topic."""
    own = [(name, value) for name, value in letter.headers if name in OWN_HEADERS]
    return Record(None, None, [*own, (DROPPED_HEADER, b"key, value, headers")])
