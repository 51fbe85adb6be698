"""Bytes to messages: everything valid comes back, everything else says what is wrong and where."""

from __future__ import annotations

import time
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topics.codec import (
    MAX_VALUE_BYTES,
    SCHEMA_HEADER,
    DecodeError,
    decode_click,
    decode_recommendation,
    decode_release,
    decode_request,
    encode,
    record_key,
)
from topics.messages import (
    BEHAVIORS,
    MAX_ID,
    AnsweredClick,
    BehaviorEvent,
    ModelReleased,
    RankedItem,
    Recommendation,
    RecommendRequest,
    Trigger,
)

NOW_S = 1_700_000_000
CLICK: dict[str, Any] = {
    "event_id": "e1",
    "user_id": 7,
    "item_id": 11,
    "category_id": 3,
    "behavior": "pv",
    "timestamp": NOW_S - 60,
}
REQUEST: dict[str, Any] = {"request_id": "r1", "user_id": 7}

ids = st.integers(0, MAX_ID)
labels = st.text(st.characters(codec="utf-8"), min_size=1, max_size=128)
clicks = st.builds(
    BehaviorEvent,
    event_id=labels,
    user_id=ids,
    item_id=ids,
    category_id=ids,
    behavior=st.sampled_from(BEHAVIORS),
    timestamp=st.integers(1, NOW_S),
)
requests = st.builds(
    RecommendRequest,
    request_id=labels,
    user_id=ids,
    k=st.integers(1, 1000),
    candidates=st.none() | st.lists(ids, max_size=5),
    exclude=st.lists(ids, max_size=5),
    priority=st.sampled_from(["high", "normal", "low"]),
    deadline_ms=st.none() | st.integers(1, 60_000),
)
finite = st.floats(allow_nan=False, allow_infinity=False)
recommendations = st.builds(
    Recommendation,
    recommendation_id=labels,
    user_id=ids,
    trigger=st.builds(
        Trigger,
        kind=st.sampled_from(["click", "request"]),
        clicks=st.lists(
            st.builds(AnsweredClick, event_id=labels, item_id=ids, topic=labels, partition=ids, offset=ids),
            max_size=2,
        ),
        request_id=st.none() | labels,
    ),
    items=st.lists(
        st.builds(RankedItem, item_id=ids, score=finite, source=st.sampled_from(["retrieval", "popular"])),
        max_size=4,
    ),
    model_version=labels,
    engine=labels,
    degraded=st.sampled_from([None, "cached", "popular"]),
    timings_ms=st.dictionaries(labels, finite, max_size=3),
    generated_at=finite,
)
releases = st.builds(
    ModelReleased,
    version=labels,
    uri=labels,
    sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    stage=st.sampled_from(["canary", "serving", "retired"]),
    traffic_percent=st.integers(0, 100),
)


@given(clicks)
def test_a_click_comes_back_as_it_was(click: BehaviorEvent) -> None:
    value, headers = encode(click)
    assert decode_click(record_key(click.user_id), value, headers, now_s=NOW_S) == click


@given(requests)
def test_a_request_comes_back_as_it_was(request: RecommendRequest) -> None:
    value, headers = encode(request)
    assert decode_request(record_key(request.user_id), value, headers) == request


@given(recommendations)
def test_a_recommendation_comes_back_as_it_was(recommendation: Recommendation) -> None:
    assert decode_recommendation(*encode(recommendation)) == recommendation


@given(releases)
def test_a_release_comes_back_as_it_was(release: ModelReleased) -> None:
    assert decode_release(*encode(release)) == release


@given(st.binary(max_size=200), st.none() | st.binary(max_size=10))
def test_no_bytes_whatever_raise_anything_but_decode_error(value: bytes, key: bytes | None) -> None:
    for decode in (decode_click, decode_request):
        with pytest.raises(DecodeError):
            decode(key, value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5) | finite,
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*CLICK, *REQUEST, "k", "candidates", "deadline_ms"]), json_values))
def test_no_object_whatever_raises_anything_but_decode_error(change: dict[str, Any]) -> None:
    for decode, base in ((decode_click, CLICK), (decode_request, REQUEST)):
        try:
            decode(b"7", orjson.dumps({**base, **change}))
        except DecodeError as error:
            assert error.reason and error.field and error.detail


def refused(value: bytes | None, key: bytes | None = b"7", headers: Any = ()) -> DecodeError:
    with pytest.raises(DecodeError) as raised:
        decode_click(key, value, headers, now_s=NOW_S)
    return raised.value


def test_the_click_of_these_tests_is_accepted() -> None:
    assert decode_click(b"7", orjson.dumps(CLICK), now_s=NOW_S) == BehaviorEvent(**CLICK)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "not-json"),
        (b"click", "not-json"),
        (b"{", "not-json"),
        (b"\xef\xbb\xbf" + orjson.dumps(CLICK), "not-json"),
        (orjson.dumps(CLICK)[:-1] + b',"note":"\xff\xfe"}', "not-json"),
        (b'{"event_id":"\\ud800"}', "not-json"),
        (b'{"user_id":NaN}', "not-json"),
        (b"[" * 10_000 + b"]" * 10_000, "not-json"),
        (orjson.dumps(CLICK)[:-1] + b',"note":' + b"[" * 5_000 + b"]" * 5_000 + b"}", "not-json"),
        (b"[]", "not-an-object"),
        (b"7", "not-an-object"),
        (b"null", "not-an-object"),
        (b'"click"', "not-an-object"),
        (None, "tombstone"),
    ],
)
def test_a_value_that_is_no_json_object_is_refused(value: bytes | None, reason: str) -> None:
    error = refused(value)
    assert (error.reason, error.field) == (reason, "value")


@pytest.mark.parametrize("field", list(CLICK))
def test_each_missing_field_is_named(field: str) -> None:
    without = {name: value for name, value in CLICK.items() if name != field}
    error = refused(orjson.dumps(without))
    assert (error.reason, error.field) == ("missing-field", field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("user_id", "7"),
        ("user_id", -1),
        ("user_id", 2**63),
        ("user_id", 2**64 - 1),
        ("user_id", 7.0),
        ("user_id", True),
        ("user_id", None),
        ("user_id", [7]),
        ("item_id", -1),
        ("item_id", 2**63),
        ("item_id", {"id": 1}),
        ("category_id", -5),
        ("category_id", 2**63),
        ("behavior", "purchase"),
        ("behavior", "PV"),
        ("behavior", ""),
        ("behavior", 1),
        ("event_id", ""),
        ("event_id", "x" * 129),
        ("event_id", 5),
        ("timestamp", "1700000000"),
        ("timestamp", 1.7e9),
        ("timestamp", 0),
        ("timestamp", -1),
    ],
)
def test_each_wrong_field_is_named(field: str, value: Any) -> None:
    error = refused(orjson.dumps({**CLICK, field: value}))
    assert (error.reason, error.field) == ("invalid-field", field)
    assert error.detail


def test_an_id_beyond_64_bits_is_refused() -> None:
    # Parsers differ: orjson reads such a number as a float, which a strict integer is not.
    value = orjson.dumps(CLICK).replace(b'"item_id":11', b'"item_id":' + b"9" * 40)
    assert refused(value).field == "item_id"


@pytest.mark.parametrize("timestamp", [NOW_S * 1000, NOW_S * 1000 + 999, NOW_S * 1_000_000])
def test_a_timestamp_in_milliseconds_is_named_as_such(timestamp: int) -> None:
    error = refused(orjson.dumps({**CLICK, "timestamp": timestamp}))
    assert (error.reason, error.field) == ("timestamp-unit", "timestamp")
    assert "milliseconds" in error.detail


def test_a_timestamp_more_than_a_day_ahead_is_refused_and_a_day_is_not() -> None:
    day_s = 24 * 3600
    assert decode_click(b"7", orjson.dumps({**CLICK, "timestamp": NOW_S + day_s}), now_s=NOW_S)
    error = refused(orjson.dumps({**CLICK, "timestamp": NOW_S + day_s + 5}))
    assert (error.reason, error.field) == ("timestamp-future", "timestamp")


def test_the_clock_is_the_wall_clock_unless_given() -> None:
    ahead = orjson.dumps({**CLICK, "timestamp": int(time.time()) + 2 * 24 * 3600})
    with pytest.raises(DecodeError, match="timestamp-future"):
        decode_click(b"7", ahead)


@pytest.mark.parametrize("key", [None, b""])
def test_an_empty_key_is_refused(key: bytes | None) -> None:
    error = refused(orjson.dumps(CLICK), key)
    assert (error.reason, error.field) == ("empty-key", "key")


@pytest.mark.parametrize("key", [b"8", b"07", b" 7", b"7\n", b"\xff\xfe", b"9" * 100])
def test_a_key_that_is_not_the_user_is_refused(key: bytes) -> None:
    error = refused(orjson.dumps(CLICK), key)
    assert (error.reason, error.field) == ("key-mismatch", "key")


def test_ten_megabytes_are_refused_before_they_are_parsed(monkeypatch) -> None:
    def parse(value: bytes) -> None:
        raise AssertionError("parsed")

    value = b'{"x":"' + b"a" * 10_000_000 + b'"}'
    monkeypatch.setattr(orjson, "loads", parse)
    error = refused(value)
    assert (error.reason, error.field) == ("too-large", "value")


def test_the_size_limit_is_inclusive() -> None:
    padding = MAX_VALUE_BYTES - len(orjson.dumps({**CLICK, "note": ""}))
    assert decode_click(b"7", orjson.dumps({**CLICK, "note": "a" * padding}), now_s=NOW_S)
    assert refused(orjson.dumps({**CLICK, "note": "a" * (padding + 1)})).reason == "too-large"


@pytest.mark.parametrize("version", [b"2", b"", b"01", b"\xff"])
def test_another_schema_version_is_refused(version: bytes) -> None:
    error = refused(orjson.dumps(CLICK), headers=[("trace", b"x"), (SCHEMA_HEADER, version)])
    assert (error.reason, error.field) == ("schema-version", SCHEMA_HEADER)


def test_a_newer_producer_may_add_fields_and_headers() -> None:
    value = orjson.dumps({**CLICK, "session": "s9", "user_idd": 1})
    headers = [("traceparent", b"00-1"), (SCHEMA_HEADER, b"1")]
    assert decode_click(b"7", value, headers, now_s=NOW_S) == BehaviorEvent(**CLICK)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"k": 0}, "k"),
        ({"k": 1001}, "k"),
        ({"k": "10"}, "k"),
        ({"candidates": [1, -2]}, "candidates.1"),
        ({"candidates": [2**63]}, "candidates.0"),
        ({"candidates": list(range(1001))}, "candidates"),
        ({"candidates": "1,2"}, "candidates"),
        ({"exclude": None}, "exclude"),
        ({"priority": "urgent"}, "priority"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"request_id": ""}, "request_id"),
    ],
)
def test_each_wrong_field_of_a_request_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(DecodeError) as raised:
        decode_request(b"7", orjson.dumps({**REQUEST, **change}))
    assert (raised.value.reason, raised.value.field) == ("invalid-field", field)


def test_a_request_with_no_candidates_at_all_is_not_one_with_none_given() -> None:
    assert decode_request(b"7", orjson.dumps({**REQUEST, "candidates": []})).candidates == []
    assert decode_request(b"7", orjson.dumps(REQUEST)).candidates is None


def test_messages_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        BehaviorEvent(**CLICK).user_id = 8
