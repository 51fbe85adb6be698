"""What a connection sends: gathered for one write, and no more of it than the peer's windows allow."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Final

from inference.http2.frames import (
    DATA,
    DEFAULT_FRAME,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    LARGEST_WINDOW,
    Code,
    ConnectionFailed,
    StreamFailed,
    frame,
)
from inference.http2.messages import PREFIX, PREFIX_BYTES
from inference.http2.status import DONE, HEAD

# HEADERS, and the DATA frame up to the message: an answer that is sent whole.
_OPEN: Final = struct.Struct(f">HBBBL{len(HEAD)}sHBBBLBL")
_CLOSE: Final = frame(HEADERS, END_HEADERS | END_STREAM, 0, DONE)
_CLOSE_HEAD, _CLOSE_TAIL = _CLOSE[:5], _CLOSE[9:]


class Sending:
    """What the outbox keeps of a stream."""

    __slots__ = ("opened", "over", "quiet", "stream", "trailers", "unsent", "window")

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.over = False  # all is sent, or nothing is wanted
        self.quiet = 0  # sweeps since something moved
        self.opened = False  # the headers are sent
        self.window = 0  # what the client lets us send, beside what it lets any stream
        self.unsent = memoryview(b"")
        self.trailers = b""


class Outbox:
    """Of one connection. `finished` is told of every call that has been answered."""

    def __init__(self, loop: asyncio.AbstractEventLoop, finished: Callable[[Sending], None]) -> None:
        self._loop = loop
        self._finished = finished
        self.transport: asyncio.Transport | None = None
        self._gathered: list[bytes] = []
        self._due = False
        self.paused = False
        self.window = DEFAULT_WINDOW
        self.stream_window = DEFAULT_WINDOW
        self.frame_bytes = DEFAULT_FRAME
        self._waiting: dict[int, Sending] = {}
        self.sent = 0  # frames of answers so far
        self.waiting_bytes = 0

    def put(self, content: bytes) -> None:
        """Frames that no window holds up."""
        self._gathered.append(content)
        if not self._due:
            self._due = True
            self._loop.call_soon(self.flush)

    def gather(self) -> None:
        """`flush` will be called: nothing needs to be scheduled for it."""
        self._due = True

    def flush(self) -> None:
        self._due = False
        gathered = self._gathered
        if gathered:
            transport = self.transport
            if transport is not None and not transport.is_closing():
                transport.write(b"".join(gathered))
            gathered.clear()

    def answer(self, call: Sending, message: bytes) -> None:
        """The whole answer of a call that has none yet."""
        length = len(message)
        size = length + PREFIX_BYTES
        if (
            size > self.window
            or size > self.frame_bytes
            or size > self.stream_window + call.window
            or self._waiting
        ):
            self.message(call, message)
            self.complete(call)
            return
        self.window -= size
        self.sent += 1
        stream = call.stream
        self._gathered += (
            _OPEN.pack(
                *(0, len(HEAD), HEADERS, END_HEADERS, stream, HEAD),
                *(size >> 8, size & 255, DATA, 0, stream, 0, length),
            ),
            message,
            _CLOSE_HEAD + stream.to_bytes(4, "big") + _CLOSE_TAIL,
        )
        if not self._due:
            self._due = True
            self._loop.call_soon(self.flush)
        call.over = True
        self._finished(call)

    def message(self, call: Sending, message: bytes) -> None:
        """One message of an answer; more or the end may follow."""
        self._open(call)
        unsent = PREFIX.pack(0, len(message)) + message
        call.unsent = memoryview(bytes(call.unsent) + unsent if call.unsent else unsent)
        self.waiting_bytes += len(unsent)
        self._waiting[call.stream] = call
        self.pump()

    def complete(self, call: Sending) -> None:
        """The end of an answer."""
        self._open(call)
        self.end(call, DONE)

    def trailers(self, call: Sending, block: bytes) -> None:
        """The end of one that is not complete, whatever of it has not been sent."""
        self.drop(call)
        self.end(call, block if call.opened else HEAD + block)

    def end(self, call: Sending, block: bytes) -> None:
        """This header block, after what waits."""
        if call.unsent:
            call.trailers = block
            return
        self.sent += 1
        call.over = True
        self.put(frame(HEADERS, END_HEADERS | END_STREAM, call.stream, block))
        self._finished(call)

    def drop(self, call: Sending) -> None:
        """Forget what was not sent of a call."""
        if self._waiting.pop(call.stream, None) is not None:
            self.waiting_bytes -= len(call.unsent)
            call.unsent = memoryview(b"")

    def widen(self, more: int) -> None:
        self.window += more
        if self.window > LARGEST_WINDOW:
            raise ConnectionFailed(Code.FLOW_CONTROL_ERROR, "a window beyond 2^31 - 1")
        self.pump()

    def widen_stream(self, call: Sending, more: int) -> None:
        call.window += more
        if self.stream_window + call.window > LARGEST_WINDOW:
            raise StreamFailed(Code.FLOW_CONTROL_ERROR)
        self.pump()

    def pump(self) -> None:
        """Send what the windows allow of what waits, the longest first."""
        if not self._waiting or self.paused:
            return
        for call in list(self._waiting.values()):
            while call.unsent:
                room = min(len(call.unsent), self.window, self.stream_window + call.window, self.frame_bytes)
                if room <= 0:
                    break
                self.put(frame(DATA, 0, call.stream, bytes(call.unsent[:room])))
                call.unsent = call.unsent[room:]
                call.window -= room
                call.quiet = 0
                self.window -= room
                self.waiting_bytes -= room
                self.sent += 1
            if not call.unsent:
                del self._waiting[call.stream]
                if call.trailers:
                    self.end(call, call.trailers)
            elif self.window <= 0:
                break

    def _open(self, call: Sending) -> None:
        if not call.opened:
            call.opened = True
            self.put(frame(HEADERS, END_HEADERS, call.stream, HEAD))
