"""What leaves the worker: ranked lists and dead letters as records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import orjson

from stream.delivery import Record
from stream.work import LogRecord
from topics.codec import ATTEMPTS_HEADER, DROPPED_HEADER, LETTER_HEADERS, MESSAGE_HEADERS, record_key
from topics.messages import Degradation


class AnsweredClick(NamedTuple):
    """As `topics.messages.AnsweredClick`: its values were checked when the click was read."""

    event_id: str
    item_id: int
    topic: str
    partition: int
    offset: int


class Asked(NamedTuple):
    """What a list answers, and how it is to be. A tuple of what holds nothing, so that thousands in hand
    are nothing to the collector of garbage."""

    recommendation_id: str
    user_id: int
    k: int
    asked_at_s: float  # Unix seconds at which the triggering record was written
    trigger: bytes  # JSON of `topics.messages.Trigger`
    exclude: frozenset[int] = frozenset()
    candidates: tuple[int, ...] | None = None


class Listed(NamedTuple):
    """A list as it is written: all of a `Recommendation` that does not depend on what it answers. Written
    once, it may answer many."""

    body: bytes
    size: int
    degraded: Degradation | None = None


def recommendation_id(topic: str, epoch: int, partition: int, offset: int) -> str:
    """The same record always gives the same id; a recreated topic (another epoch) gives others."""
    return f"{topic}-{epoch:08x}-{partition}-{offset}"


def click_trigger(clicks: Iterable[AnsweredClick]) -> bytes:
    return orjson.dumps({"kind": "click", "clicks": [click._asdict() for click in clicks]})


def request_trigger(request_id: str) -> bytes:
    return b'{"kind":"request","clicks":[],"request_id":%b}' % orjson.dumps(request_id)


def items_json(
    items: Sequence[int], scores: Sequence[float], sources: Sequence[str], model_version: str, engine: str
) -> bytes:
    """The list itself and who made it, as it stands in a body."""
    lines = [
        {"item_id": item, "score": score, "source": source}
        for item, score, source in zip(items, scores, sources, strict=True)
    ]
    made = orjson.dumps({"items": lines, "model_version": model_version, "engine": engine})
    return made[1:-1]


def ranked(items: bytes, size: int, timings: bytes) -> Listed:
    """`timings`: JSON of how long what took, in milliseconds."""
    return Listed(b'%b,"timings_ms":%b' % (items, timings), size)


def degraded(items: bytes, size: int, how: Degradation) -> Listed:
    return Listed(b'%b,"timings_ms":{},"degraded":"%b"' % (items, how.encode()), size, how)


def replies(asked: Iterable[Asked], lists: Iterable[Listed], now_s: float) -> list[Record]:
    """The records of `Recommendation`s, put together from what is written already: a list that nobody
    ranked costs a microsecond. `tests/stream/test_replies.py` holds them equal to the message type."""
    now = orjson.dumps(now_s)
    return [
        Record(
            record_key(one.user_id),
            b'{"recommendation_id":%b,"user_id":%d,"trigger":%b,%b,"generated_at":%b}'
            % (orjson.dumps(one.recommendation_id), one.user_id, one.trigger, listed.body, now),
            MESSAGE_HEADERS,
        )
        for one, listed in zip(asked, lists, strict=True)
    ]


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
        elif name not in LETTER_HEADERS:
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
    own = [(name, value) for name, value in letter.headers if name in LETTER_HEADERS]
    return Record(None, None, [*own, (DROPPED_HEADER, b"key, value, headers")])
