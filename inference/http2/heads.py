"""What the headers of a request ask for: gRPC's, over HTTP/2 (PROTOCOL-HTTP2.md)."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from inference.http2.headers import Fields, check_request, literal, size
from inference.http2.limits import MAX_METADATA_BYTES
from inference.http2.status import HEAD, Failure, Status

ENCODINGS: Final = ("identity", "deflate", "gzip")
_TIMEOUT: Final = re.compile(rb"(\d{1,8})([HMSmun])")
_SECONDS: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}


@dataclass(frozen=True, slots=True)
class Deferred:
    """One message to one, by a coroutine; it is told how many seconds the client's deadline leaves."""

    serve: Callable[[bytes, float | None], Coroutine[Any, Any, bytes]]


@dataclass(frozen=True, slots=True)
class Immediate:
    """One message to one, at once."""

    serve: Callable[[bytes], bytes]


@dataclass(frozen=True, slots=True)
class Streaming:
    """Each message to some, at once, until the client has no more."""

    serve: Callable[[bytes], Iterable[bytes]]


Method = Deferred | Immediate | Streaming


@dataclass(frozen=True, slots=True)
class Head:
    """`refusal` is the header block that ends the call unread, empty where it is to be served."""

    method: Method | None
    timeout_s: float | None = None
    encoding: str = ENCODINGS[0]
    refusal: bytes = b""


def head_of(methods: Mapping[str, Method], fields: Fields) -> Head:
    """Raises `StreamFailed` where the fields make no HTTP/2 request."""
    check_request(fields)
    if size(fields) > MAX_METADATA_BYTES:
        return _refused(
            Failure(Status.RESOURCE_EXHAUSTED, f"more than {MAX_METADATA_BYTES} bytes of metadata")
        )
    said = dict(fields)
    if said[b":method"] != b"POST":
        return Head(None, refusal=literal(":status", "405") + literal("allow", "POST"))
    if not said.get(b"content-type", b"").startswith(b"application/grpc"):
        return Head(None, refusal=literal(":status", "415"))
    method = methods.get(said[b":path"].decode("latin-1"))
    if method is None:
        return _refused(Failure(Status.UNIMPLEMENTED, "the server has no such method"))
    encoding = said.get(b"grpc-encoding", b"identity").decode("latin-1")
    if encoding not in ENCODINGS:
        words = f"messages may come as {', '.join(ENCODINGS)}"
        accepted = (("grpc-accept-encoding", ",".join(ENCODINGS)),)
        return _refused(Failure(Status.UNIMPLEMENTED, words, accepted))
    try:
        timeout_s = timeout_of(said[b"grpc-timeout"]) if b"grpc-timeout" in said else None
    except ValueError:
        return _refused(Failure(Status.INTERNAL, "grpc-timeout is no time"))
    return Head(method, timeout_s, encoding)


def timeout_of(text: bytes) -> float:
    """Seconds of a grpc-timeout."""
    matched = _TIMEOUT.fullmatch(text)
    if matched is None:
        raise ValueError(text)
    return int(matched[1]) * _SECONDS[matched[2]]


def _refused(failure: Failure) -> Head:
    return Head(None, refusal=HEAD + failure.block())
