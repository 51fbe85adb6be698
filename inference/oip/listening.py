"""Listening over HTTP: how many connections there may be, and how long one may be idle."""

from __future__ import annotations

import asyncio
import ssl
from typing import Final

from aiohttp import web

# A handshake that takes longer is given up.
HANDSHAKE_S: Final = 10.0
# How long a client that is one too many may take to read that it is.
LINGER_S: Final = 1.0
_BODY: Final = b'{"error":"the server has as many connections as it may have"}'
_REFUSAL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)


async def listen(
    app: web.Application,
    host: str,
    port: int,
    *,
    reuse_port: bool = False,
    tls: ssl.SSLContext | None = None,
    most: int = 1024,
    idle_s: float = 75.0,
) -> tuple[web.AppRunner, int]:
    """Serve an application; the runner to clean up, and the port. A client that goes away cancels its
    handler; one beyond `most` connections reads a 503; one that asks nothing for `idle_s`, or does not
    finish asking, is closed."""
    runner = web.AppRunner(
        app,
        access_log=None,
        handle_signals=False,
        handler_cancellation=True,
        shutdown_timeout=1.0,
        keepalive_timeout=idle_s,
    )
    await runner.setup()
    try:
        await _Site(runner, host, port, reuse_port=reuse_port, ssl_context=tls, most=most).start()
    except OSError:
        await runner.cleanup()
        raise
    return runner, int(runner.addresses[0][1])


class _Site(web.TCPSite):
    """Counts before it accepts. Handshakes in progress are not counted; they are bounded in time."""

    def __init__(self, runner: web.AppRunner, host: str, port: int, *, most: int, **options: object) -> None:
        super().__init__(runner, host, port, **options)  # type: ignore[arg-type]
        self._most = most
        self._new = 0

    async def start(self) -> None:
        await web.BaseSite.start(self)
        self._server = await asyncio.get_running_loop().create_server(
            self._accept,
            self._host,
            self._port,
            ssl=self._ssl_context,
            backlog=self._backlog,
            reuse_port=self._reuse_port,
            ssl_handshake_timeout=None if self._ssl_context is None else HANDSHAKE_S,
        )

    def _accept(self) -> asyncio.BaseProtocol:
        server = self._runner.server
        assert server is not None
        if len(server.connections) + self._new >= self._most:
            return _Refused()
        # The handler counts itself in the loop's next turn.
        self._new += 1
        asyncio.get_running_loop().call_soon(self._counted)
        return server()

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
