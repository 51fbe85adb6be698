"""Which streams of a connection there are, and which there were."""

from __future__ import annotations

from typing import Generic, TypeVar

from inference.http2.frames import Code, ConnectionFailed
from inference.http2.limits import GIVEN_UP_KEPT

T = TypeVar("T")


class Streams(Generic[T]):
    """Those that are open, by number. A client's are odd, and each is higher than those before."""

    def __init__(self) -> None:
        self.open: dict[int, T] = {}
        self.last = 0
        self._given_up: dict[int, None] = {}

    def begin(self, stream: int) -> None:
        """One that is higher than the last. Raises `ConnectionFailed`."""
        if not stream & 1:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "a client's streams are odd")
        self.last = stream

    def must_have_been(self, stream: int) -> None:
        """Raises `ConnectionFailed` for one that never was."""
        if not stream & 1 or stream > self.last:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "a frame of a stream that is not open")

    def give_up(self, stream: int) -> None:
        """Before its client was done sending: what still comes is dropped unread."""
        self._given_up[stream] = None
        if len(self._given_up) > GIVEN_UP_KEPT:
            del self._given_up[next(iter(self._given_up))]

    def is_given_up(self, stream: int) -> bool:
        return stream in self._given_up
