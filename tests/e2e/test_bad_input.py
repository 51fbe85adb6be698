"""Whatever anybody writes into the topics that a worker reads: a list or a dead letter for each record, and
the worker goes on. Values are every field made every kind of wrong, and bytes that hypothesis thinks of."""

from __future__ import annotations

import json
import time
from collections import Counter
from random import Random
from typing import Any

import orjson
from confluent_kafka import Producer
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from compression.releases.registry import Registry
from infra.clients import everything, reader
from tests.support import eventually
from topics.codec import DecodeError, decode_click, decode_recommendation, decode_request
from topics.messages import ModelReleased

ODD: tuple[Any, ...] = (
    *(None, True, [], {}, "", "\x00", "7", "NaN", "x" * 200, {"a": [1]}, [-1], [2**63], [1] * 1001),
    *(-1, 0, 1.5, -(2**63), 2**63 - 1, 2**63, 2**64, 10**400, 1e308, float("nan"), float("inf")),
    *(1_511_600_000_000, 3_999_999_999, 2**32),
)
BYTES = (
    *(
        b"",
        b"\x00",
        b"null",
        b"1",
        b'"x"',
        b"[]",
        b"{}",
        b"\xef\xbb\xbf{}",
        b"{}\n{}",
        b"\xff\xfe",
        b"\x1f\x8b",
    ),
    *(b"[" * 5_000, b'{"a":' * 5_000, b"x" * 65_536, b"x" * 700_000, b'{"event_id": "\xed\xa0\x80"}'),
    b'{"user_id": "\\ud800"}',
)
KEYS = (None, b"", b"8", b"07", b"+7", b" 7", b"7\x00", b"\xff" * 10, b"k" * 10_000)
VERSIONS = (b"2", None, b"", b"\xff" * 1_000)
Written = tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]


def click(number: int, **changes: Any) -> dict[str, Any]:
    fields = {
        "event_id": f"good-{number}",
        "user_id": 7,
        "item_id": number,
        "category_id": 1,
        "behavior": "pv",
        "timestamp": int(time.time()) - number % 3,
    }
    return {**fields, **changes}


def ask(number: int, **changes: Any) -> dict[str, Any]:
    return {"request_id": f"good-{number}", "user_id": 7, "k": 5, **changes}


def spoilt(make: Any, fields: list[str], guesses: SearchStrategy[bytes]) -> list[Written]:
    """Records around user 7, some of which are good all the same."""
    rng = Random(4)
    values = [json.dumps(make(n, **{f: odd})).encode() for f in fields for n, odd in enumerate(ODD)]
    values += [json.dumps(without(make(0), field)).encode() for field in fields]
    values += [*BYTES, *(example(guesses, seed) for seed in range(60))]
    made: list[Written] = [(b"7", value, []) for value in values]
    made += [(key, json.dumps(make(1)).encode(), []) for key in KEYS]
    made += [(b"7", json.dumps(make(2)).encode(), [("tailrace-schema", version)]) for version in VERSIONS]
    made += [(b"7", json.dumps(make(3)).encode(), [("h", None), ("attempts", b"x"), ("", b"\xff")])]
    made += [
        (b"7", None, []),
        (b"7", json.dumps(make(4)).encode(), []),
        (b"7", json.dumps(make(4)).encode(), []),
    ]
    rng.shuffle(made)
    return made


def without(body: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name != field}


def example(strategy: SearchStrategy[bytes], seed: int) -> bytes:
    """One value of a strategy, the same for each seed."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    found: list[bytes] = []

    @seeded(seed)
    @settings(max_examples=2, phases=[Phase.generate], database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def draw(value: bytes) -> None:
        found.append(value)

    draw()
    return found[-1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
GUESSES = st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode())


def kinds(written: list[Written], decode: Any) -> Counter[str]:
    """What each record is: "good", or the reason why not."""
    found: Counter[str] = Counter()
    for key, value, headers in written:
        try:
            decode(key, value, headers)
        except DecodeError as error:
            found[error.reason] += 1
        else:
            found["good"] += 1
    return found


def test_every_record_ends_as_a_list_or_a_dead_letter_and_releases_are_still_taken(
    parts, registry, start_worker
):
    version = Registry(registry).resolve("serving")
    # What is announced is all it hears of.
    worker = start_worker(environment={"STREAM_ALIAS_POLL_S": "0"})
    pid, topics = worker.pid, parts.topics
    clicks = spoilt(click, list(click(0)), GUESSES)
    asks = spoilt(
        ask, ["request_id", "user_id", "k", "candidates", "exclude", "priority", "deadline_ms"], GUESSES
    )
    announced = {"version": "../../etc", "uri": "file:///etc", "sha256": "0" * 64, "stage": "serving"}
    releases = [(b"serving", value, []) for value in (None, *BYTES, json.dumps(announced).encode())]
    releases += [(key, b"{", []) for key in (b"", b"\xff", b"other")]
    # kafka-python sends no header without a value; others do.
    producer = Producer({"bootstrap.servers": parts.kafka.bootstrap, "partitioner": "murmur2_random"})
    for topic, records in ((topics.clicks, clicks), (topics.requests, asks), (topics.releases, releases)):
        for key, value, headers in records:
            producer.produce(topic, key=key, value=value, headers=headers)
    assert producer.flush(30) == 0

    expected = {"clicks": kinds(clicks, decode_click), "requests": kinds(asks, decode_request)}
    good = sum(found["good"] for found in expected.values())
    bad = sum(found.total() for found in expected.values()) - good

    def letters() -> list[Any]:
        consumer = reader(parts.kafka.bootstrap, topics.dead_letters)
        try:
            return list(everything(consumer))
        finally:
            consumer.close()

    def lists() -> list[Any]:
        consumer = reader(parts.kafka.bootstrap, topics.recommendations)
        try:
            return [decode_recommendation(record.value, record.headers) for record in everything(consumer)]
        finally:
            consumer.close()

    eventually(
        lambda: len({body.recommendation_id for body in lists()}) >= good and len(letters()) >= bad, 60
    )
    assert Counter(body.trigger.kind for body in lists()) == {
        "click": expected["clicks"]["good"],
        "request": expected["requests"]["good"],
    }
    reasons = Counter(dict(letter.headers)["reason"].decode() for letter in letters())
    together = expected["clicks"] + expected["requests"]
    assert reasons == Counter({reason: count for reason, count in together.items() if reason != "good"})
    assert all(score == score for body in lists() for score in (item.score for item in body.items))
    assert worker.metric("tailrace_unanswered_units_total") == 0
    assert worker.pid == pid

    digest = Registry(registry).manifest_sha256(version)
    release = ModelReleased(version=version, uri="models", sha256=digest, stage="serving")
    value = orjson.dumps({**release.model_dump(), "sha256": "f" * 64})
    producer.produce(topics.releases, key=b"serving", value=value)
    assert producer.flush(30) == 0
    # Read after all of the above, and refused by name.
    eventually(lambda: "announcement" in worker.models()["refused"], 30)
    assert worker.readiness()["model"] == version
