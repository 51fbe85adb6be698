"""HTTP/2 frames: their numbers, and how one is written (RFC 9113, sections 4 and 6)."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)
END_STREAM = ACK = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITISED: Final = 0x20

# Of SETTINGS.
ENABLE_PUSH, MAX_STREAMS, INITIAL_WINDOW, MAX_FRAME, MAX_HEADER_LIST = 2, 3, 4, 5, 6

DEFAULT_WINDOW: Final = 65_535
DEFAULT_FRAME: Final = 16_384
LARGEST_FRAME: Final = 2**24 - 1
LARGEST_WINDOW: Final = 2**31 - 1
LARGEST_STREAM: Final = 2**31 - 1
HEAD_BYTES: Final = 9
# Length in two parts, type, flags, stream.
HEAD: Final = struct.Struct(">HBBBL")
SETTING: Final = struct.Struct(">HL")


class Code(IntEnum):
    """Why a stream or a connection ends."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class ConnectionFailed(Exception):
    """The peer broke a rule, or a bound, that concerns the whole connection: GOAWAY."""

    def __init__(self, code: Code, words: str) -> None:
        super().__init__(words)
        self.code = code


class StreamFailed(Exception):
    """One that concerns one stream: RST_STREAM."""

    def __init__(self, code: Code) -> None:
        super().__init__(code.name)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    size = len(payload)
    return HEAD.pack(size >> 8, size & 255, kind, flags, stream) + payload


def settings(values: dict[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(SETTING.pack(*item) for item in values.items()))


def window_update(stream: int, more: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, more.to_bytes(4, "big"))


def rst_stream(stream: int, code: Code) -> bytes:
    return frame(RST_STREAM, 0, stream, code.to_bytes(4, "big"))


def goaway(last: int, code: Code, words: str = "") -> bytes:
    return frame(GOAWAY, 0, 0, struct.pack(">LL", last, code) + words.encode())


def unpadded(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Where the content of a PADDED frame, whose payload is data[at:end], begins and ends."""
    if at == end or end - at <= data[at]:
        raise ConnectionFailed(Code.PROTOCOL_ERROR, "more padding than frame")
    return at + 1, end - data[at]
