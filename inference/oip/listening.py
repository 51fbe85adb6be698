"""HTTP: how many connections there may be, and how long one may be idle."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Final

from aiohttp import web

# A handshake that takes longer is given up.
HANDSHAKE_S: Final = 10.0
# How long a client that is one too many may take to read that it is.
LINGER_S: Final = 1.0
_BACKLOG: Final = 128
_BODY: Final = b'{"error":"the server has as many connections as it may have"}'
_REFUSAL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)


class Http:
    """begin → listen, or take → close. A client that goes away cancels its handler; one beyond `most`
    connections reads a 503; one that asks nothing for `idle_s`, or does not finish asking, is closed."""

    def __init__(
        self,
        app: web.Application,
        *,
        tls: ssl.SSLContext | None = None,
        most: int = 1024,
        idle_s: float = 75.0,
    ) -> None:
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            handler_cancellation=True,
            shutdown_timeout=1.0,
            keepalive_timeout=idle_s,
        )
        self._tls = tls
        self._handshake_s = None if tls is None else HANDSHAKE_S
        self._most = most
        self._new = 0
        self._listener: asyncio.Server | None = None

    @property
    def open(self) -> int:
        """How many connections there are, without handshakes in progress: those are bounded in time."""
        return len(self._server.connections) + self._new

    async def begin(self) -> None:
        await self._runner.setup()

    async def listen(self, host: str, port: int) -> int:
        """The port. Raises `OSError` where that cannot be."""
        self._listener = await asyncio.get_running_loop().create_server(
            self._accept,
            host,
            port,
            ssl=self._tls,
            backlog=_BACKLOG,
            ssl_handshake_timeout=self._handshake_s,
        )
        return int(self._listener.sockets[0].getsockname()[1])

    async def take(self, connection: socket.socket) -> None:
        """Serve a connection that was accepted elsewhere; over when it is open. Raises `OSError`."""
        await asyncio.get_running_loop().connect_accepted_socket(
            self._accept, connection, ssl=self._tls, ssl_handshake_timeout=self._handshake_s
        )

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()

    @property
    def _server(self) -> web.Server:
        server = self._runner.server
        assert server is not None
        return server

    def _accept(self) -> asyncio.BaseProtocol:
        """Counts before it accepts."""
        if self.open >= self._most:
            return _Refused()
        # The handler counts itself in the loop's next turn.
        self._new += 1
        asyncio.get_running_loop().call_soon(self._counted)
        return self._server()

    def _counted(self) -> None:
        self._new -= 1


class _Refused(asyncio.Protocol):
    """One too many: told so, whatever it asks."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(_REFUSAL)
        # Closed at once, with the question unread, the answer would not arrive.
        if transport.can_write_eof():
            transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_S, transport.close)
