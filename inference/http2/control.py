"""The frames that carry no call: settings, windows, pings."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Generic, TypeVar

from inference.http2 import frames as f
from inference.http2.frames import Code, ConnectionFailed, StreamFailed
from inference.http2.limits import MAX_FRAME_BYTES, MAX_IDLE_FRAMES, MAX_SETTINGS
from inference.http2.manners import Pings
from inference.http2.sending import Outbox, Sending
from inference.http2.streams import Streams
from inference.http2.walker import Take

S = TypeVar("S", bound=Sending)


class Control(Generic[S]):
    """Of one connection. Raises `ConnectionFailed` and `StreamFailed`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        outbox: Outbox,
        streams: Streams[S],
        min_ping_interval_s: float,
    ) -> None:
        self._loop = loop
        self._outbox = outbox
        self._streams = streams
        self._pings = Pings(min_ping_interval_s)
        self._idle = 0
        self._sent = 0
        self.frames: Mapping[int, Take] = {
            f.PRIORITY: self._priority,
            f.SETTINGS: self._settings,
            f.PUSH_PROMISE: self._unexpected,
            f.PING: self._ping,
            f.WINDOW_UPDATE: self._window,
            f.CONTINUATION: self._unexpected,
        }

    def count(self) -> None:
        """One frame that neither asks for anything nor brings anything."""
        if self._sent != self._outbox.sent:
            self._sent = self._outbox.sent
            self._idle = 0
        self._idle += 1
        if self._idle > MAX_IDLE_FRAMES:
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, "frames without end that ask for nothing")

    def useful(self) -> None:
        """One that does."""
        self._idle = 0

    def _priority(self, flags: int, stream: int, data: bytes, at: int, end: int) -> None:
        self.count()
        if not stream:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "a priority of no stream")
        if end - at != 5:
            raise StreamFailed(Code.FRAME_SIZE_ERROR)

    def _settings(self, flags: int, stream: int, data: bytes, at: int, end: int) -> None:
        self.count()
        if stream:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "settings of a stream")
        if (end - at) % f.SETTING.size or (flags & f.ACK and at < end):
            raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "settings that are cut")
        if flags & f.ACK:
            return
        if end - at > MAX_SETTINGS * f.SETTING.size:
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, "too many settings")
        told = list(f.SETTING.iter_unpack(data[at:end]))
        for name, value in told:
            self._set(name, value)
        # Once a frame: a client may say a window 64 times in one, and looking at all streams costs.
        if windows := [value for name, value in told if name == f.INITIAL_WINDOW]:
            widest = max((sending.window for sending in self._streams.open.values()), default=0)
            if max(windows) + max(0, widest) > f.LARGEST_WINDOW:
                raise ConnectionFailed(Code.FLOW_CONTROL_ERROR, "a window beyond 2^31 - 1")
        self._outbox.put(f.frame(f.SETTINGS, f.ACK, 0))
        self._outbox.pump()

    def _set(self, name: int, value: int) -> None:
        if name == f.ENABLE_PUSH and value > 1:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "push is 0 or 1")
        if name == f.MAX_FRAME:
            if not f.DEFAULT_FRAME <= value <= f.LARGEST_FRAME:
                raise ConnectionFailed(Code.PROTOCOL_ERROR, "a frame size that is not allowed")
            self._outbox.frame_bytes = min(value, MAX_FRAME_BYTES)
        elif name == f.INITIAL_WINDOW:
            self._outbox.stream_window = value

    def _ping(self, flags: int, stream: int, data: bytes, at: int, end: int) -> None:
        if stream:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "a ping of a stream")
        if end - at != 8:
            raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "a ping has eight bytes")
        if flags & f.ACK:
            self.count()
            return
        if not self._pings.allowed(self._loop.time(), bool(self._streams.open), self._outbox.sent):
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, "too_many_pings")
        self._outbox.put(f.frame(f.PING, f.ACK, 0, data[at:end]))

    def _window(self, flags: int, stream: int, data: bytes, at: int, end: int) -> None:
        self.count()
        if end - at != 4:
            raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "WINDOW_UPDATE has four bytes")
        more = int.from_bytes(data[at:end], "big") & f.LARGEST_WINDOW
        if not stream:
            if not more:
                raise ConnectionFailed(Code.PROTOCOL_ERROR, "a window wider by nothing")
            self._outbox.widen(more)
            return
        self._streams.must_have_been(stream)
        if not more:
            raise StreamFailed(Code.PROTOCOL_ERROR)
        sending = self._streams.open.get(stream)
        if sending is not None:
            self._outbox.widen_stream(sending, more)

    def _unexpected(self, flags: int, stream: int, data: bytes, at: int, end: int) -> None:
        raise ConnectionFailed(Code.PROTOCOL_ERROR, "a frame that has no place here")
