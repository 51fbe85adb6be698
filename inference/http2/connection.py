"""One client: its frames in, its calls, and the end of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol, cast

from inference.http2 import frames as f
from inference.http2.call import Call
from inference.http2.frames import Code, ConnectionFailed, StreamFailed
from inference.http2.headers import Fields, HeaderReader, check_field
from inference.http2.heads import Head
from inference.http2.limits import (
    CONNECTION_WINDOW,
    GIVEN_UP_KEPT,
    LINGER_S,
    MAX_BLOCK_BYTES,
    MAX_CONTINUATIONS,
    MAX_FRAME_BYTES,
    MAX_IDLE_FRAMES,
    MAX_METADATA_BYTES,
    MAX_SETTINGS,
    STREAM_WINDOW,
    Limits,
)
from inference.http2.manners import Pings, Resets
from inference.http2.sending import Outbox, Sending
from inference.http2.status import HEAD, Failure, Status

_FULL: Final = (
    HEAD + Failure(Status.RESOURCE_EXHAUSTED, "the server has as many calls as it may have").block()
)
_LEAVING: Final = Failure(Status.UNAVAILABLE, "the server is leaving")
_KEEPALIVE: Final = b"tailrace"  # eight bytes that come back


class Host(Protocol):
    """What a connection needs of its server."""

    limits: Limits
    calls: int  # of all connections

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
        self._calls: dict[int, Call] = {}
        self._given_up: dict[int, None] = {}
        self._last = 0  # the client's latest stream
        self._rest = b""
        self._began = False  # the preface is read
        self._settled = False  # and the client's settings
        self._block: tuple[int, bool, bytearray, int] | None = None  # stream, END_STREAM, bytes, frames
        self._unread = 0
        self._held = 0
        self._idle_frames = 0
        self._answers = 0  # of the outbox when last compared
        self._pings = Pings(self.limits.min_ping_interval_s)
        self._resets = Resets(loop.time())
        self._leaving = False  # no more calls
        self._closing = False
        self._ends: list[asyncio.TimerHandle] = []
        # In sweeps.
        self._age = 0
        self._idle = 0
        self._silent = 0
        self._stuck = 0
        self._unwritten = 0
        self._asked = False  # a ping of ours is unanswered
        take: dict[int, Callable[[int, int, bytes, int, int], None]] = {
            f.DATA: self._data,
            f.HEADERS: self._header,
            f.PRIORITY: self._priority,
            f.RST_STREAM: self._reset,
            f.SETTINGS: self._settings,
            f.PUSH_PROMISE: self._unexpected,
            f.PING: self._ping,
            f.GOAWAY: self._goaway,
            f.WINDOW_UPDATE: self._window,
            f.CONTINUATION: self._unexpected,
        }
        self._take = take

    # What asyncio calls ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = self.outbox.transport = cast(asyncio.Transport, transport)
        secure = transport.get_extra_info("ssl_object")
        if secure is not None and secure.selected_alpn_protocol() != "h2":
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
        self._closing = True
        for timer in self._ends:
            timer.cancel()
        for call in list(self._calls.values()):
            self._drop(call)
        self._host.lost(self)

    def pause_writing(self) -> None:
        # Who does not read is not read either.
        self.outbox.paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self.outbox.paused = False
        self._stuck = 0
        if not self._closing:
            self._transport.resume_reading()
            self.outbox.pump()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        self._silent = 0
        self.outbox.gather()
        try:
            self._walk(self._rest + data if self._rest else data)
        except ConnectionFailed as error:
            self._fail(error.code, str(error))
        finally:
            self.outbox.flush()

    # What its server calls ------------------------------------------------------------------------

    def leave(self) -> None:
        """No more calls; the connection ends with the last of those in hand."""
        if not self._closing:
            self._leaving = True
            self.outbox.put(f.goaway(self._last, Code.NO_ERROR))
            self._close_when_idle()

    def end(self) -> None:
        """Now."""
        for call in list(self._calls.values()):
            call.fail(_LEAVING)
        self.close()

    def close(self) -> None:
        """Once what was said is sent."""
        self._closing = True
        self.outbox.flush()
        self._transport.close()
        self._ends.append(self.loop.call_later(self.limits.stall_s, self._transport.abort))

    def look(self, sweep_s: float, now_s: float) -> None:
        """Once a sweep, which comes every so often."""
        limits = self.limits
        if self._closing:
            return
        self._age += 1
        self._silent += 1
        if (not self._settled and self._age * sweep_s > limits.handshake_s) or self._is_stuck(sweep_s):
            self._transport.abort()
            return
        self._idle = 0 if self._calls else self._idle + 1
        if self._idle * sweep_s > limits.idle_s:
            self._fail(Code.NO_ERROR, "nothing was asked for a while")
            return
        if not self._silent * sweep_s > limits.keepalive_s:
            self._asked = False
        elif not self._asked:
            self._asked = True
            self.outbox.put(f.frame(f.PING, 0, 0, _KEEPALIVE))
        elif self._silent * sweep_s > limits.keepalive_s + limits.keepalive_timeout_s:
            self._transport.abort()
            return
        for call in list(self._calls.values()):
            if not call.look(now_s, limits.idle_s / sweep_s, limits.stall_s / sweep_s):
                self._give_up(call, Code.CANCEL)

    # What its calls call --------------------------------------------------------------------------

    def hold(self, more: int) -> bool:
        self._held += more
        return self._held <= self.limits.max_held_bytes

    def _finished(self, sending: Sending) -> None:
        """A call has its answer."""
        call = self._calls.pop(sending.stream)
        self._forget(call)
        if not call.ended:
            # It need not send the rest.
            self.outbox.put(f.rst_stream(call.stream, Code.NO_ERROR))
            self._remember(call.stream)
        if self._leaving:
            self._close_when_idle()

    # Ends -----------------------------------------------------------------------------------------

    def _give_up(self, call: Call, code: Code) -> None:
        self.outbox.put(f.rst_stream(call.stream, code))
        self._remember(call.stream)
        self._drop(call)

    def _drop(self, call: Call) -> None:
        del self._calls[call.stream]
        self.outbox.drop(call)
        call.reset()
        self._forget(call)
        if self._leaving:
            self._close_when_idle()

    def _forget(self, call: Call) -> None:
        self._host.calls -= 1
        self._idle = 0
        if call.body:
            self._held -= len(call.body)
        call.body = None

    def _remember(self, stream: int) -> None:
        self._given_up[stream] = None
        if len(self._given_up) > GIVEN_UP_KEPT:
            del self._given_up[next(iter(self._given_up))]

    def _fail(self, code: Code, words: str) -> None:
        if not self._closing:
            self._closing = True
            self.outbox.put(f.goaway(self._last, code, words))
            self.outbox.flush()
            # Closed at once, with more to read, the words would not arrive.
            if self._transport.can_write_eof():
                self._transport.write_eof()
            self._ends.append(self.loop.call_later(LINGER_S, self.close))

    def _close_when_idle(self) -> None:
        if not self._calls and not self._closing:
            self._closing = True
            self.loop.call_soon(self.close)  # after what is gathered

    def _is_stuck(self, sweep_s: float) -> bool:
        """Whether the socket has taken nothing for too long."""
        unwritten = self._transport.get_write_buffer_size()
        if unwritten < self._unwritten:
            self._silent = 0
        self._stuck = self._stuck + 1 if unwritten and unwritten >= self._unwritten else 0
        self._unwritten = unwritten
        return self._stuck * sweep_s > self.limits.stall_s

    # Frames ---------------------------------------------------------------------------------------

    def _walk(self, data: bytes) -> None:
        at, size, head, take = 0, len(data), f.HEAD.unpack_from, self._take
        if not self._began:
            known = data[: len(f.PREFACE)]
            if not f.PREFACE.startswith(known):
                raise ConnectionFailed(Code.PROTOCOL_ERROR, "not HTTP/2 with prior knowledge")
            if len(known) < len(f.PREFACE):
                self._rest = data
                return
            self._began = True
            at = len(f.PREFACE)
        while size - at >= f.HEAD_BYTES:
            high, low, kind, flags, stream = head(data, at)
            length = high << 8 | low
            if length > MAX_FRAME_BYTES:
                raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "a frame beyond SETTINGS_MAX_FRAME_SIZE")
            at += f.HEAD_BYTES
            end = at + length
            if end > size:
                at -= f.HEAD_BYTES
                break
            stream &= f.LARGEST_STREAM
            try:
                if self._block is not None:
                    self._continue(kind, flags, stream, data[at:end])
                elif not self._settled and (kind != f.SETTINGS or flags & f.ACK):
                    raise ConnectionFailed(Code.PROTOCOL_ERROR, "the first frame is SETTINGS")
                elif kind in take:
                    take[kind](flags, stream, data, at, end)
                else:
                    self._count_idle()
            except StreamFailed as error:
                self._fail_stream(stream, error.code)
            if self._closing:
                return
            at = end
        self._rest = data[at:]

    def _data(self, flags: int, stream: int, data: bytes, at: int, end: int) -> None:
        length = end - at
        self._unread += length
        if self._unread > CONNECTION_WINDOW:
            raise ConnectionFailed(Code.FLOW_CONTROL_ERROR, "more than the window")
        if self._unread > CONNECTION_WINDOW // 2:
            self.outbox.put(f.window_update(0, self._unread))
            self._unread = 0
        if flags & f.PADDED:
            at, end = f.unpadded(data, at, end)
        call = self._calls.get(stream)
        if call is None:
            self._count_idle()
            if stream in self._given_up:
                return
            self._must_be_known(stream)
            raise StreamFailed(Code.STREAM_CLOSED)
        if call.ended:
            raise StreamFailed(Code.STREAM_CLOSED)
        ended = bool(flags & f.END_STREAM)
        if at < end:
            self._idle_frames = 0
        elif not ended:
            self._count_idle()
        if not ended:
            call.unread += length
            if call.unread > STREAM_WINDOW:
                raise StreamFailed(Code.FLOW_CONTROL_ERROR)
            if call.unread > STREAM_WINDOW // 2:
                self.outbox.put(f.window_update(stream, call.unread))
                call.unread = 0
        call.received(data, at, end, ended)

    def _header(self, flags: int, stream: int, data: bytes, at: int, end: int) -> None:
        if flags & f.PADDED:
            at, end = f.unpadded(data, at, end)
        if flags & f.PRIORITISED:
            at += 5
            if at > end:
                raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "a priority that is cut")
        ended = bool(flags & f.END_STREAM)
        if flags & f.END_HEADERS:
            self._opened(stream, ended, data[at:end])
        else:
            self._block = (stream, ended, bytearray(data[at:end]), 0)

    def _continue(self, kind: int, flags: int, stream: int, content: bytes) -> None:
        assert self._block is not None
        expected, ended, block, count = self._block
        if kind != f.CONTINUATION or stream != expected:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "a header block goes on in CONTINUATION")
        block += content
        if len(block) > MAX_BLOCK_BYTES or count == MAX_CONTINUATIONS:
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, "a header block without end")
        self._block = (stream, ended, block, count + 1)
        if flags & f.END_HEADERS:
            self._block = None
            self._opened(stream, ended, bytes(block))

    def _opened(self, stream: int, ended: bool, block: bytes) -> None:
        if stream <= self._last:
            self._trailed(stream, ended, block)
            return
        if not stream & 1:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "a client's streams are odd")
        self._last = stream
        self._idle_frames = 0
        head = self._headers.read(block)
        if self._leaving:
            self._remember(stream)
            return
        host, limits = self._host, self.limits
        if len(self._calls) >= limits.max_streams or self.outbox.waiting_bytes > limits.max_held_bytes:
            raise StreamFailed(Code.REFUSED_STREAM)
        call = self._calls[stream] = Call(self, stream, head)
        host.calls += 1
        refusal = head.refusal or (_FULL if host.calls > limits.max_calls else b"")
        if refusal:
            call.ended = ended
            self.outbox.refuse(call, refusal)
        elif ended:
            call.received(b"", 0, 0, True)

    def _trailed(self, stream: int, ended: bool, block: bytes) -> None:
        """Headers after the first: trailers, which are not used."""
        self._count_idle()
        fields = self._headers.decode(block)
        call = self._calls.get(stream)
        if call is None:
            if stream in self._given_up:
                return
            raise ConnectionFailed(Code.STREAM_CLOSED, "headers for a stream that is closed")
        if call.ended:
            raise StreamFailed(Code.STREAM_CLOSED)
        if not ended:
            raise StreamFailed(Code.PROTOCOL_ERROR)
        for name, value in fields:
            check_field(name, value)
        call.received(b"", 0, 0, True)

    def _priority(self, flags: int, stream: int, data: bytes, at: int, end: int) -> None:
        self._count_idle()
        if not stream:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "a priority of no stream")
        if end - at != 5:
            raise StreamFailed(Code.FRAME_SIZE_ERROR)

    def _reset(self, flags: int, stream: int, data: bytes, at: int, end: int) -> None:
        if end - at != 4:
            raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "RST_STREAM has four bytes")
        self._must_be_known(stream)
        call = self._calls.get(stream)
        if call is None:
            self._count_idle()
        elif not self._resets.allowed(self.loop.time()):
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, "too many calls are given up")
        else:
            self._drop(call)

    def _settings(self, flags: int, stream: int, data: bytes, at: int, end: int) -> None:
        self._count_idle()
        if stream:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "settings of a stream")
        if (end - at) % f.SETTING.size or (flags & f.ACK and at < end):
            raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "settings that are cut")
        if flags & f.ACK:
            return
        if end - at > MAX_SETTINGS * f.SETTING.size:
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, "too many settings")
        self._settled = True
        for name, value in f.SETTING.iter_unpack(data[at:end]):
            self._set(name, value)
        self.outbox.put(f.frame(f.SETTINGS, f.ACK, 0))
        self.outbox.pump()

    def _set(self, name: int, value: int) -> None:
        if name == f.ENABLE_PUSH and value > 1:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "push is 0 or 1")
        if name == f.MAX_FRAME:
            if not f.DEFAULT_FRAME <= value <= f.LARGEST_FRAME:
                raise ConnectionFailed(Code.PROTOCOL_ERROR, "a frame size that is not allowed")
            self.outbox.frame_bytes = min(value, MAX_FRAME_BYTES)
        elif name == f.INITIAL_WINDOW:
            widest = max((call.window for call in self._calls.values()), default=0)
            if value + max(0, widest) > f.LARGEST_WINDOW:
                raise ConnectionFailed(Code.FLOW_CONTROL_ERROR, "a window beyond 2^31 - 1")
            self.outbox.stream_window = value

    def _ping(self, flags: int, stream: int, data: bytes, at: int, end: int) -> None:
        if stream:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "a ping of a stream")
        if end - at != 8:
            raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "a ping has eight bytes")
        if flags & f.ACK:
            self._count_idle()
            return
        if not self._pings.allowed(self.loop.time(), bool(self._calls), self.outbox.answers):
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, "too_many_pings")
        self.outbox.put(f.frame(f.PING, f.ACK, 0, data[at:end]))

    def _goaway(self, flags: int, stream: int, data: bytes, at: int, end: int) -> None:
        self._count_idle()
        if stream or end - at < 8:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "a GOAWAY that is none")
        self._leaving = True
        self._close_when_idle()

    def _window(self, flags: int, stream: int, data: bytes, at: int, end: int) -> None:
        self._count_idle()
        if end - at != 4:
            raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "WINDOW_UPDATE has four bytes")
        more = int.from_bytes(data[at:end], "big") & f.LARGEST_WINDOW
        if not stream:
            if not more:
                raise ConnectionFailed(Code.PROTOCOL_ERROR, "a window wider by nothing")
            self.outbox.widen(more)
            return
        self._must_be_known(stream)
        if not more:
            raise StreamFailed(Code.PROTOCOL_ERROR)
        call = self._calls.get(stream)
        if call is not None:
            self.outbox.widen_stream(call, more)

    def _unexpected(self, flags: int, stream: int, data: bytes, at: int, end: int) -> None:
        raise ConnectionFailed(Code.PROTOCOL_ERROR, "a frame that has no place here")

    def _must_be_known(self, stream: int) -> None:
        if not stream or stream > self._last or not stream & 1:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "a frame of a stream that is not open")

    def _fail_stream(self, stream: int, code: Code) -> None:
        call = self._calls.get(stream)
        if call is not None:
            self._give_up(call, code)
        else:
            self.outbox.put(f.rst_stream(stream, code))
            self._remember(stream)

    def _count_idle(self) -> None:
        if self._answers != self.outbox.answers:
            self._answers = self.outbox.answers
            self._idle_frames = 0
        self._idle_frames += 1
        if self._idle_frames > MAX_IDLE_FRAMES:
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, "frames without end that ask for nothing")
