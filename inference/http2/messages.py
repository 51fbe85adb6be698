"""gRPC's messages within the bytes of a stream: a flag, a length, and so many bytes."""

from __future__ import annotations

import struct
import zlib
from typing import Final

from inference.http2.status import Failure, Status

PREFIX: Final = struct.Struct(">BL")
PREFIX_BYTES: Final = 5
_WINDOW_BITS: Final = {"gzip": 31, "deflate": 15}


class Refused(Exception):
    """The call ends with this failure."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.words)
        self.failure = failure


def length_at(body: bytes | bytearray, at: int, most: int) -> tuple[bool, int]:
    """Whether the message is compressed, and its length. Raises `Refused` for one that is too long."""
    flag, length = PREFIX.unpack_from(body, at)
    if flag > 1:
        raise Refused(Failure(Status.INTERNAL, f"a message is compressed or not, its flag is {flag}"))
    if length > most:
        raise Refused(too_long(most))
    return bool(flag), length


def too_long(most: int) -> Failure:
    return Failure(Status.RESOURCE_EXHAUSTED, f"a message may have {most} bytes")


def inflated(content: bytes, encoding: str, most: int) -> bytes:
    """Without its compression; raises `Refused`, before it has made more than `most` bytes of it."""
    bits = _WINDOW_BITS.get(encoding)
    if bits is None:
        raise Refused(Failure(Status.INTERNAL, "a message is compressed, the headers do not say how"))
    inflater = zlib.decompressobj(bits)
    try:
        plain = inflater.decompress(content, most + 1)
    except zlib.error:
        raise Refused(Failure(Status.INTERNAL, f"a message is not {encoding}")) from None
    if len(plain) > most:
        raise Refused(too_long(most))
    if not inflater.eof or inflater.unused_data:
        raise Refused(Failure(Status.INTERNAL, f"a message is not {encoding}"))
    return plain
