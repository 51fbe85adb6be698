"""One client: its calls, and the end of it."""

from __future__ import annotations

import asyncio
from typing import Final, Protocol, cast

from inference.http2 import frames as f
from inference.http2.call import Call
from inference.http2.control import Control
from inference.http2.frames import Code, ConnectionFailed, StreamFailed
from inference.http2.headers import Fields, HeaderReader, check_field
from inference.http2.heads import Head
from inference.http2.limits import (
    CONNECTION_WINDOW,
    LINGER_S,
    MAX_FRAME_BYTES,
    MAX_METADATA_BYTES,
    STREAM_WINDOW,
    Limits,
)
from inference.http2.manners import Resets
from inference.http2.sending import Outbox, Sending
from inference.http2.status import HEAD, Failure, Status
from inference.http2.streams import Streams
from inference.http2.walker import Walker
from inference.http2.watch import Watch

_FULL: Final = (
    HEAD + Failure(Status.RESOURCE_EXHAUSTED, "the server has as many calls as it may have").block()
)
_LEAVING: Final = Failure(Status.UNAVAILABLE, "the server is leaving")


class Host(Protocol):
    """What a connection needs of its server."""

    limits: Limits
    calls: int  # of all connections
    held: int  # bytes of requests that are not whole, of all connections

    def parse(self, fields: Fields) -> Head: ...

    def made(self, connection: Connection) -> bool:
        """False where it is one too many."""

    def lost(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """Reads whole buffers. A rule that is broken ends the stream or the connection it was broken on."""

    def __init__(self, host: Host, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.limits = host.limits
        self.outbox = Outbox(loop, self._finished)
        self._host = host
        self._transport: asyncio.Transport
        self._headers = HeaderReader(host.parse)
        self._streams: Streams[Call] = Streams()
        self._control = Control(loop, self.outbox, self._streams, self.limits.min_ping_interval_s)
        own = {f.DATA: self._data, f.RST_STREAM: self._reset, f.GOAWAY: self._goaway}
        self._walker = Walker(
            {**self._control.frames, **own}, self._control.count, self._opened, self._fail_stream
        )
        self._watch = Watch(self.limits)
        self._resets = Resets(loop.time())
        self._unread = 0  # bytes taken that the client was not told of
        self._held = 0  # bytes of requests that are not whole
        self._leaving = False  # no more calls
        self._ends: list[asyncio.TimerHandle] = []

    # What asyncio calls ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = self.outbox.transport = cast(asyncio.Transport, transport)
        secure = transport.get_extra_info("ssl_object")
        if secure is not None and secure.selected_alpn_protocol() != "h2":
            self._walker.stopped = True
            self._transport.abort()
            return
        if not self._host.made(self):
            self._fail(Code.ENHANCE_YOUR_CALM, "the server has as many connections as it may have")
            return
        said = {
            f.MAX_STREAMS: self.limits.max_streams,
            f.INITIAL_WINDOW: STREAM_WINDOW,
            f.MAX_FRAME: MAX_FRAME_BYTES,
            f.MAX_HEADER_LIST: MAX_METADATA_BYTES,
        }
        self.outbox.put(f.settings(said) + f.window_update(0, CONNECTION_WINDOW - f.DEFAULT_WINDOW))

    def connection_lost(self, exc: Exception | None) -> None:
        self._walker.stopped = True
        for timer in self._ends:
            timer.cancel()
        for call in list(self._streams.open.values()):
            self._drop(call)
        self._host.lost(self)

    def pause_writing(self) -> None:
        # Who does not read is not read either.
        self.outbox.paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self.outbox.paused = False
        if not self._transport.is_closing():
            self._transport.resume_reading()
            self.outbox.pump()

    def data_received(self, data: bytes) -> None:
        if self._walker.stopped:
            return
        self._watch.heard()
        self.outbox.gather()
        try:
            self._walker.feed(data)
        except ConnectionFailed as error:
            self._fail(error.code, str(error))
        finally:
            self.outbox.flush()

    # What its server calls ------------------------------------------------------------------------

    def look(self, now_s: float) -> None:
        """Once a sweep."""
        if self._walker.stopped:
            return
        match self._watch.look(
            settled=self._walker.settled,
            busy=bool(self._streams.open),
            unwritten=self._transport.get_write_buffer_size(),
        ):
            case "dead":
                self._transport.abort()
                return
            case "idle":
                self._fail(Code.NO_ERROR, "nothing was asked for a while")
                return
            case "silent":
                self.outbox.put(f.frame(f.PING, 0, 0, b"tailrace"))
        for call in list(self._streams.open.values()):
            if not call.look(now_s):
                self._fail_stream(call.stream, Code.CANCEL)

    def leave(self) -> None:
        """No more calls; the connection ends with the last of those in hand."""
        if not self._walker.stopped:
            self._leaving = True
            self.outbox.put(f.goaway(self._streams.last, Code.NO_ERROR))
            self._part_when_idle()

    def end(self) -> None:
        """Now; what was said is sent."""
        for call in list(self._streams.open.values()):
            call.fail(_LEAVING)
        self._walker.stopped = True
        self.outbox.flush()
        self._close()

    def abort(self) -> None:
        """Whatever was not sent."""
        self._transport.abort()

    # What its calls call --------------------------------------------------------------------------

    def hold(self, more: int) -> bool:
        self._held += more
        self._host.held += more
        limits = self.limits
        return self._held <= limits.max_held_bytes and self._host.held <= limits.max_unfinished_bytes

    def _finished(self, sending: Sending) -> None:
        """A call has its answer."""
        call = self._streams.open.pop(sending.stream)
        if not call.ended:
            # It need not send the rest.
            self.outbox.put(f.rst_stream(call.stream, Code.NO_ERROR))
            self._streams.give_up(call.stream)
        self._forget(call)

    # Frames ---------------------------------------------------------------------------------------

    def _opened(self, stream: int, ended: bool, block: bytes) -> None:
        if stream <= self._streams.last:
            self._trailed(stream, ended, block)
            return
        self._streams.begin(stream)
        self._control.useful()
        head = self._headers.read(block)
        if self._leaving:
            self._streams.give_up(stream)
            return
        open_, host, limits = self._streams.open, self._host, self.limits
        if len(open_) >= limits.max_streams or self.outbox.waiting_bytes > limits.max_held_bytes:
            raise StreamFailed(Code.REFUSED_STREAM)
        call = open_[stream] = Call(self, stream, head)
        host.calls += 1
        refusal = head.refusal or (_FULL if host.calls > limits.max_calls else b"")
        if refusal:
            call.ended = ended
            self.outbox.end(call, refusal)
        elif ended:
            call.received(b"", 0, 0, True)

    def _trailed(self, stream: int, ended: bool, block: bytes) -> None:
        """Headers after the first: trailers, which are not used."""
        self._control.count()
        fields = self._headers.decode(block)
        call = self._streams.open.get(stream)
        if call is None:
            if self._streams.is_given_up(stream):
                return
            raise ConnectionFailed(Code.STREAM_CLOSED, "headers for a stream that is closed")
        if call.ended:
            raise StreamFailed(Code.STREAM_CLOSED)
        if not ended:
            raise StreamFailed(Code.PROTOCOL_ERROR)
        for name, value in fields:
            check_field(name, value)
        call.received(b"", 0, 0, True)

    def _data(self, flags: int, stream: int, data: bytes, at: int, end: int) -> None:
        length = end - at
        self._unread += length
        if self._unread > CONNECTION_WINDOW // 2:
            self.outbox.put(f.window_update(0, self._unread))
            self._unread = 0
        if flags & f.PADDED:
            at, end = f.unpadded(data, at, end)
        call = self._streams.open.get(stream)
        if call is None:
            self._control.count()
            if self._streams.is_given_up(stream):
                return
            self._streams.must_have_been(stream)
            raise StreamFailed(Code.STREAM_CLOSED)
        if call.ended:
            raise StreamFailed(Code.STREAM_CLOSED)
        ended = bool(flags & f.END_STREAM)
        if at < end:
            self._control.useful()
        elif not ended:
            self._control.count()
        if not ended:
            call.unread += length
            if call.unread > STREAM_WINDOW // 2:
                self.outbox.put(f.window_update(stream, call.unread))
                call.unread = 0
        call.received(data, at, end, ended)

    def _reset(self, flags: int, stream: int, data: bytes, at: int, end: int) -> None:
        if end - at != 4:
            raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "RST_STREAM has four bytes")
        self._streams.must_have_been(stream)
        call = self._streams.open.get(stream)
        if call is None:
            self._control.count()
        elif not self._resets.allowed(self.loop.time()):
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, "too many calls are given up")
        else:
            self._drop(call)

    def _goaway(self, flags: int, stream: int, data: bytes, at: int, end: int) -> None:
        if stream or end - at < 8:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "a GOAWAY that is none")
        self._leaving = True
        self._part_when_idle()

    # Ends -----------------------------------------------------------------------------------------

    def _fail_stream(self, stream: int, code: Code) -> None:
        self.outbox.put(f.rst_stream(stream, code))
        self._streams.give_up(stream)
        call = self._streams.open.get(stream)
        if call is not None:
            self._drop(call)

    def _drop(self, call: Call) -> None:
        """A call that nobody answers."""
        del self._streams.open[call.stream]
        self.outbox.drop(call)
        call.reset()
        self._forget(call)

    def _forget(self, call: Call) -> None:
        self._host.calls -= 1
        self._watch.asked()
        if call.body:
            self.hold(-len(call.body))
        call.body = None
        if self._leaving:
            self._part_when_idle()

    def _fail(self, code: Code, words: str) -> None:
        if not self._walker.stopped:
            self.outbox.put(f.goaway(self._streams.last, code, words))
            self._part()

    def _part_when_idle(self) -> None:
        if not self._streams.open and not self._walker.stopped:
            self._walker.stopped = True
            self.loop.call_soon(self._part)  # after what is being said

    def _part(self) -> None:
        """Closed at once, with more to read, our last words would not arrive: the client closes, or time."""
        self._walker.stopped = True
        for call in list(self._streams.open.values()):
            self._drop(call)
        self.outbox.flush()
        if not self._transport.is_closing():
            if self._transport.can_write_eof():
                self._transport.write_eof()
            self._ends.append(self.loop.call_later(LINGER_S, self._close))

    def _close(self) -> None:
        # Once: closed again, asyncio's transport of TLS forgets what `abort` would end.
        if not self._transport.is_closing():
            self._transport.close()
            self._ends.append(self.loop.call_later(self.limits.stall_s, self._transport.abort))
