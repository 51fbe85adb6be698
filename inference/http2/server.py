"""Listens, or is handed connections; looks at them now and then, and leaves in order."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

from inference.http2.connection import Connection
from inference.http2.headers import Fields
from inference.http2.heads import Head, Method, head_of
from inference.http2.limits import Limits

_BACKLOG: Final = 512
# For what a connection says at its end to leave: a peer that does not read, or does not end TLS, is cut off.
_LAST_S: Final = 0.5


class Server:
    """start, or begin and take → stop. `methods` are by path: /package.Service/Method."""

    def __init__(self, methods: Mapping[str, Method], limits: Limits) -> None:
        self.limits = limits
        self.calls = self.held = 0
        self._methods = methods
        self._connections: set[Connection] = set()
        self._alone = asyncio.Event()
        self._alone.set()
        self._listener: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._tls: ssl.SSLContext | None = None

    @property
    def open(self) -> int:
        """How many connections there are."""
        return len(self._connections)

    async def start(self, host: str, port: int, *, tls: ssl.SSLContext | None = None) -> int:
        """The port it listens on. Raises `OSError` where that cannot be."""
        self._listener = await asyncio.get_running_loop().create_server(
            self._accept,
            host,
            port,
            ssl=tls,
            backlog=_BACKLOG,
            ssl_handshake_timeout=None if tls is None else self.limits.handshake_s,
        )
        self.begin(tls=tls)
        return int(self._listener.sockets[0].getsockname()[1])

    def begin(self, *, tls: ssl.SSLContext | None = None) -> None:
        """Serve what it is handed."""
        self._tls = tls
        self._sweep = asyncio.get_running_loop().call_later(self.limits.sweep_s, self._look)

    async def take(self, connection: socket.socket) -> None:
        """Serve a connection that was accepted elsewhere; over when it is open. Raises `OSError`."""
        await asyncio.get_running_loop().connect_accepted_socket(
            self._accept,
            connection,
            ssl=self._tls,
            ssl_handshake_timeout=None if self._tls is None else self.limits.handshake_s,
        )

    async def stop(self, grace_s: float) -> None:
        """Accept nothing more; calls in hand have so long."""
        if self._sweep is None:
            return
        if self._listener is not None:
            self._listener.close()
        await asyncio.sleep(0)  # who was accepted in this turn of the loop is made in the next
        for connection in list(self._connections):
            connection.leave()
        await self._closed(grace_s)
        for connection in list(self._connections):
            connection.end()
        await self._closed(_LAST_S)
        for connection in list(self._connections):
            connection.abort()
        await self._closed(_LAST_S)
        self._sweep.cancel()

    async def _closed(self, most_s: float) -> None:
        """Until no connection is left, or so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                await self._alone.wait()

    def parse(self, fields: Fields) -> Head:
        return head_of(self._methods, fields)

    def made(self, connection: Connection) -> bool:
        full = len(self._connections) >= self.limits.max_connections
        if not full:
            self._connections.add(connection)
            self._alone.clear()
        return not full

    def lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._alone.set()

    def _accept(self) -> Connection:
        return Connection(self, asyncio.get_running_loop())

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        for connection in list(self._connections):
            connection.look(now_s)
        self._sweep = loop.call_later(self.limits.sweep_s, self._look)
