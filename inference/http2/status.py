"""How a call ends: gRPC's status codes, and the header blocks that say them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final
from urllib.parse import quote

from inference.http2.headers import literal
from inference.http2.limits import MAX_STATUS_CHARACTERS

# All that is printable, but %.
_PLAIN: Final = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")
_STATUS_200: Final = b"\x88"

# gRPC's own hint: a client with a retry policy waits as long.
PUSHBACK: Final = "grpc-retry-pushback-ms"

HEAD: Final = _STATUS_200 + literal("content-type", "application/grpc")
"""The header block before an answer."""
DONE: Final = literal("grpc-status", "0")
"""And the one after it."""


class Status(IntEnum):
    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


@dataclass(frozen=True, slots=True)
class Failure:
    """A status that is not OK, a sentence, and more trailing metadata."""

    status: Status
    words: str
    metadata: Sequence[tuple[str, str]] = ()

    def block(self) -> bytes:
        """The trailers."""
        words = quote(self.words[:MAX_STATUS_CHARACTERS], safe=_PLAIN, errors="replace")
        fields = [("grpc-status", str(int(self.status))), ("grpc-message", words), *self.metadata]
        return b"".join(literal(*field) for field in fields)
