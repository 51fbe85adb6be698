"""Messages to bytes and back, with the reason when bytes are not a message.

>>> value, headers = encode(RecommendRequest(request_id="r1", user_id=7))
>>> decode_request(b"7", value, headers).k
10
>>> decode_request(b"8", value, headers)
Traceback (most recent call last):
topics.codec.DecodeError: key-mismatch: key: the record key says user 8, the value says user 7
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Final, TypeVar

import orjson
from pydantic import ValidationError

from topics.messages import BehaviorEvent, Message, ModelReleased, Recommendation, RecommendRequest

SCHEMA_HEADER: Final = "tailrace-schema"
SCHEMA_VERSION: Final = 1
MAX_VALUE_BYTES: Final = 64 * 1024
MAX_FUTURE_S: Final = 24 * 3600
# Unix seconds reach this in the year 2096; a timestamp in milliseconds is past it since 2001-09.
_MILLISECONDS_FROM: Final = 4_000_000_000

Headers = Iterable[tuple[str, bytes | None]]
M = TypeVar("M", bound=Message)
MESSAGE_HEADERS: Final[tuple[tuple[str, bytes], ...]] = ((SCHEMA_HEADER, b"%d" % SCHEMA_VERSION),)
# What a dead letter says of the record that it holds, and what of that is left out of it.
ATTEMPTS_HEADER: Final = "attempts"
LETTER_HEADERS: Final = ("reason", "detail", "topic", "partition", "offset", ATTEMPTS_HEADER)
DROPPED_HEADER: Final = "dropped"


class DecodeError(ValueError):
    """Bytes that are not the message they should be.

    `reason` is a short stable code (a metric label and a dead-letter header), `field` the part of
    the record at fault, `detail` a sentence for a person.
    """

    def __init__(self, reason: str, field: str, detail: str) -> None:
        super().__init__(f"{reason}: {field}: {detail}")
        self.reason = reason
        self.field = field
        self.detail = detail


def encode(message: Message) -> tuple[bytes, list[tuple[str, bytes]]]:
    """The record value and headers for a message."""
    return orjson.dumps(message.model_dump(mode="python", exclude_none=True)), list(MESSAGE_HEADERS)


def record_key(user_id: int) -> bytes:
    """The record key of everything that concerns one user: its id in decimal."""
    return b"%d" % user_id


def decode_click(
    key: bytes | None,
    value: bytes | None,
    headers: Headers = (),
    *,
    now_s: float | None = None,
    max_bytes: int = MAX_VALUE_BYTES,
) -> BehaviorEvent:
    """A click from its record, or `DecodeError`. `now_s` is the clock that "future" is measured by."""
    raw = _load(value, headers, max_bytes)
    # Named before pydantic sees it: the commonest producer mistake deserves its own sentence.
    timestamp = raw.get("timestamp")
    if type(timestamp) is int and timestamp >= _MILLISECONDS_FROM:
        raise DecodeError(
            "timestamp-unit", "timestamp", f"{timestamp} looks like milliseconds; send Unix seconds"
        )
    event = _validate(BehaviorEvent, raw)
    now_s = time.time() if now_s is None else now_s
    if event.timestamp > now_s + MAX_FUTURE_S:
        raise DecodeError(
            "timestamp-future",
            "timestamp",
            f"{event.timestamp} is {event.timestamp - now_s:.0f} s in the future",
        )
    _check_key(key, event.user_id)
    return event


def decode_request(
    key: bytes | None,
    value: bytes | None,
    headers: Headers = (),
    *,
    max_bytes: int = MAX_VALUE_BYTES,
) -> RecommendRequest:
    """A request from its record, or `DecodeError`."""
    request = _validate(RecommendRequest, _load(value, headers, max_bytes))
    _check_key(key, request.user_id)
    return request


def decode_recommendation(value: bytes | None, headers: Headers = ()) -> Recommendation:
    """A ranked list from its record, or `DecodeError`."""
    return _validate(Recommendation, _load(value, headers, 16 * MAX_VALUE_BYTES))


def decode_release(value: bytes | None, headers: Headers = ()) -> ModelReleased:
    """A release announcement from its record, or `DecodeError`."""
    return _validate(ModelReleased, _load(value, headers, MAX_VALUE_BYTES))


def _load(value: bytes | None, headers: Headers, max_bytes: int) -> dict[str, Any]:
    if value is None:
        raise DecodeError("tombstone", "value", "the record has no value")
    if len(value) > max_bytes:
        raise DecodeError("too-large", "value", f"{len(value)} bytes, at most {max_bytes} are read")
    for name, version in headers:
        if name == SCHEMA_HEADER and version != b"1":
            raise DecodeError(
                "schema-version",
                SCHEMA_HEADER,
                f"version {(version or b'')[:16]!r} is not read here; this reader knows {SCHEMA_VERSION}",
            )
    try:
        raw = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise DecodeError("not-json", "value", str(error)) from None
    if type(raw) is not dict:
        raise DecodeError("not-an-object", "value", f"a JSON {type(raw).__name__}, not an object")
    return raw


def _validate(message_type: type[M], raw: dict[str, Any]) -> M:
    try:
        return message_type.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "value"
        reason = "missing-field" if first["type"] == "missing" else "invalid-field"
        raise DecodeError(reason, field, first["msg"]) from None


def _check_key(key: bytes | None, user_id: int) -> None:
    if not key:
        raise DecodeError("empty-key", "key", "the record key must be the user id in decimal")
    if key != b"%d" % user_id:
        shown = key[:20].decode("ascii", "replace")
        raise DecodeError(
            "key-mismatch", "key", f"the record key says user {shown}, the value says user {user_id}"
        )
