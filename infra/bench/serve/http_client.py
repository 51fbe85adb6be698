"""HTTP/1.1 with as little of it as the load needs, so that offering load takes little of the machine."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Final, cast

from infra.bench.serve.driver import Done

MAX_CONNECTIONS: Final = 512


class HttpSender:
    """POSTs bodies in turn over kept-alive connections, opened as they are needed, at most 512."""

    def __init__(self, host: str, port: int, path: str, bodies: Sequence[bytes], content_type: str) -> None:
        self._host, self._port = host, port
        self._requests = [
            (
                f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: {content_type}\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            ).encode()
            + body
            for body in bodies
        ]
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._waiting: deque[tuple[int, Done]] = deque()

    def send(self, number: int, done: Done) -> None:
        if self._idle:
            self._idle.pop().ask(self._requests[number % len(self._requests)], done)
            return
        self._waiting.append((number, done))
        if len(self._all) + len(self._opening) < MAX_CONNECTIONS:
            task = asyncio.get_running_loop().create_task(self._open())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def ready(self) -> None:
        """Connections are opened as they are needed."""

    async def reset(self) -> None:
        self.close()
        await asyncio.sleep(0.05)

    def close(self) -> None:
        self._waiting.clear()
        for connection in list(self._all):
            connection.abort()

    async def _open(self) -> None:
        try:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(lambda: _Connection(self), self._host, self._port)
        except OSError:
            if self._waiting:
                self._waiting.popleft()[1](None)
            return
        self._all.add(connection)
        self.free(connection)

    def free(self, connection: _Connection) -> None:
        if self._waiting:
            number, done = self._waiting.popleft()
            connection.ask(self._requests[number % len(self._requests)], done)
        else:
            self._idle.append(connection)

    def lost(self, connection: _Connection) -> None:
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)


class _Connection(asyncio.Protocol):
    """One request at a time. Only answers with a Content-Length are understood."""

    def __init__(self, sender: HttpSender) -> None:
        self._sender = sender
        self._transport: asyncio.Transport
        self._done: Done | None = None
        self._head = b""
        self._left = -1
        self._parts: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._sender.lost(self)
        self._answer(None)

    def ask(self, request: bytes, done: Done) -> None:
        self._done = done
        self._transport.write(request)

    def abort(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._left < 0:
            head, found, data = (self._head + data).partition(b"\r\n\r\n")
            if not found:
                self._head = head
                return
            self._head = head
            self._left = _content_length(head)
            if self._left < 0:
                self._transport.abort()
                return
        self._parts.append(data)
        self._left -= len(data)
        if self._left <= 0:
            ok = self._head[9:12] == b"200"
            body = b"".join(self._parts)
            self._head, self._left, self._parts = b"", -1, []
            self._answer(body if ok else None)
            if not self._transport.is_closing():
                self._sender.free(self)

    def _answer(self, body: bytes | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(body)


def _content_length(head: bytes) -> int:
    """-1 where the head does not say."""
    _, found, rest = head.lower().partition(b"\r\ncontent-length:")
    return int(rest.split(b"\r\n", 1)[0]) if found else -1
