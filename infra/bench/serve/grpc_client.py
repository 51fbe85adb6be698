"""Unary gRPC calls with as little of HTTP/2 as the load needs: grpc.aio would take more of the machine
than some servers that are measured do."""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Sequence
from typing import Final, cast

from infra.bench.serve.driver import Done

CONNECTIONS: Final = 8
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_INITIAL_WINDOW_SIZE: Final = 4
_MAX_FRAME: Final = 16_384
_WINDOW: Final = 65_535
_ROOM: Final = 2**30  # what a server may send us before it has to ask; a run stays below it


class GrpcSender:
    """Calls one method with serialised messages in turn, over a few connections."""

    def __init__(self, host: str, port: int, method: str, messages: Sequence[bytes]) -> None:
        self._host, self._port = host, port
        self._headers = _header_block(method, f"{host}:{port}")
        self._messages = [b"\0" + struct.pack(">I", len(message)) + message for message in messages]
        self._connections: list[_Connection] = []

    async def connect(self) -> None:
        self._connections = [await self._connected() for _ in range(CONNECTIONS)]

    async def ready(self) -> None:
        for place, connection in enumerate(self._connections):
            if connection.closed:
                self._connections[place] = await self._connected()

    async def _connected(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: _Connection(self._headers), self._host, self._port
        )
        return connection

    def send(self, number: int, done: Done) -> None:
        connection = self._connections[number % len(self._connections)]
        connection.call(self._messages[number % len(self._messages)], done)

    async def reset(self) -> None:
        self.close()
        await self.connect()

    def close(self) -> None:
        for connection in self._connections:
            connection.abort()
        self._connections.clear()


class _Connection(asyncio.Protocol):
    def __init__(self, headers: bytes) -> None:
        self._headers = headers
        self._transport: asyncio.Transport
        self._buffer = b""
        self._next_stream = 1
        self._calls: dict[int, Done] = {}
        self._answers: dict[int, list[bytes]] = {}
        self.closed = False
        # What we may still send: on the connection, on a new stream, and on streams that wait.
        self._window = _WINDOW
        self._stream_window = _WINDOW
        self._windows: dict[int, int] = {}
        self._unsent: deque[tuple[int, bytes]] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        settings = struct.pack(">HIHI", 2, 0, _INITIAL_WINDOW_SIZE, _ROOM)  # 2: no server push
        self._transport.write(
            _PREFACE
            + _frame(_SETTINGS, 0, 0, settings)
            + _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _ROOM))
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        calls, self._calls = self._calls, {}
        for done in calls.values():
            done(None)

    def abort(self) -> None:
        self._transport.abort()

    def call(self, message: bytes, done: Done) -> None:
        if self.closed:
            done(None)
            return
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self._calls[stream] = done
        headers = _frame(_HEADERS, _END_HEADERS, stream, self._headers)
        if not self._unsent and len(message) <= min(self._window, self._stream_window, _MAX_FRAME):
            self._window -= len(message)
            self._transport.write(headers + _frame(_DATA, _END_STREAM, stream, message))
            return
        self._transport.write(headers)
        self._windows[stream] = self._stream_window
        self._unsent.append((stream, message))
        self._pump()

    def _pump(self) -> None:
        """Send what the windows allow, in order."""
        while self._unsent:
            stream, message = self._unsent[0]
            size = min(len(message), self._window, self._windows[stream], _MAX_FRAME)
            if size <= 0:
                return
            self._window -= size
            self._windows[stream] -= size
            last = size == len(message)
            self._transport.write(_frame(_DATA, _END_STREAM if last else 0, stream, message[:size]))
            if last:
                self._unsent.popleft()
                del self._windows[stream]
            else:
                self._unsent[0] = (stream, message[size:])

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data
        at = 0
        while len(data) - at >= 9:
            size = int.from_bytes(data[at : at + 3], "big")
            end = at + 9 + size
            if end > len(data):
                break
            stream = int.from_bytes(data[at + 5 : at + 9], "big") & 0x7FFFFFFF
            self._take(data[at + 3], data[at + 4], stream, data[at + 9 : end])
            at = end
        self._buffer = data[at:]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _DATA:
            self._answers.setdefault(stream, []).append(payload)
        elif kind == _WINDOW_UPDATE:
            self._widen(stream, int.from_bytes(payload, "big"))
        elif kind == _SETTINGS and not flags & _ACK:
            self._apply(payload)
        elif kind == _PING and not flags & _ACK:
            self._transport.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _GOAWAY:
            self._transport.close()
        if kind == _RST_STREAM or (kind in (_DATA, _HEADERS) and flags & _END_STREAM):
            done = self._calls.pop(stream, None)
            # A call that failed has trailers and no message.
            answer = b"".join(self._answers.pop(stream, ()))
            if done is not None:
                done(answer[5:] if answer and kind != _RST_STREAM else None)

    def _widen(self, stream: int, more: int) -> None:
        if not stream:
            self._window += more
        elif stream in self._windows:
            self._windows[stream] += more
        self._pump()

    def _apply(self, payload: bytes) -> None:
        for name, value in struct.iter_unpack(">HI", payload):
            if name == _INITIAL_WINDOW_SIZE:
                for stream in self._windows:
                    self._windows[stream] += value - self._stream_window
                self._stream_window = value
        self._transport.write(_frame(_SETTINGS, _ACK, 0, b""))
        self._pump()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _header_block(method: str, authority: str) -> bytes:
    """HPACK without a dynamic table: indexes of the static one, and literals that are never indexed."""

    def literal(name: bytes, value: str) -> bytes:
        assert len(value) < 127, "one byte of length"
        return name + bytes([len(value)]) + value.encode()

    return (
        b"\x83\x86"  # :method POST, :scheme http
        + literal(b"\x04", method)  # :path
        + literal(b"\x01", authority)  # :authority
        + literal(b"\x0f\x10", "application/grpc")  # content-type
        + literal(b"\x00\x02te", "trailers")
    )
