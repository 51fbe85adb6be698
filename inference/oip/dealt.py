"""Connections that another process accepts and deals out to several, this one among them.

Over a Unix socket comes a byte that says for which front, and with it the connection. Back go `READY`, once
this process serves, and for every connection that has ended the byte it came with: whoever deals knows how
many each process has. Where that end closes, nobody deals any more; where this one does, nobody is to.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, Protocol

log = logging.getLogger(__name__)

GRPC: Final = b"g"
HTTP: Final = b"h"
READY: Final = b"r"
# How late it may be told that a connection has ended.
_TELL_S: Final = 0.1
# At the end, for connections that have come but are not with their front.
_LAST_S: Final = 0.1


class Front(Protocol):
    """Serves connections that others have accepted."""

    @property
    def open(self) -> int:
        """How many it has."""

    def take(self, connection: socket.socket) -> Coroutine[Any, Any, None]:
        """One more; over once it is open. Raises `OSError` where it does not come to that."""


class Dealt:
    """begin → close. `alone` is called when nobody deals any more."""

    def __init__(
        self, dealer: socket.socket, fronts: Mapping[bytes, Front], alone: Callable[[], None]
    ) -> None:
        """`dealer` is closed at the end."""
        self._dealer = dealer
        self._fronts = fronts
        self._alone = alone
        self._had: Counter[bytes] = Counter()  # not told to have ended
        self._coming: dict[asyncio.Task[None], bytes] = {}
        self._tell: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Take connections from now on."""
        loop = asyncio.get_running_loop()
        self._dealer.setblocking(False)
        self._dealer.send(READY)
        loop.add_reader(self._dealer, self._read)
        self._tell = loop.call_later(_TELL_S, self._tell_ended)

    async def close(self) -> None:
        """Take no more; those that have come are with their fronts."""
        if self._tell is None:
            return
        self._read()
        self._end()
        if self._coming:
            await asyncio.wait(self._coming, timeout=_LAST_S)
        for task in list(self._coming):
            task.cancel()

    def _end(self) -> None:
        if self._tell is not None:
            asyncio.get_running_loop().remove_reader(self._dealer)
            self._tell.cancel()
            self._tell = None
            self._dealer.close()

    def _read(self) -> None:
        while self._tell is not None:
            try:
                front, files, _, _ = socket.recv_fds(self._dealer, 1, 1)
            except BlockingIOError:
                return
            except OSError as error:
                log.warning("A connection did not arrive: %s", error)
                front, files = b"", []
            if not front:
                self._end()
                self._alone()
                return
            self._had[front] += 1  # even if it did not arrive, for want of files: then it has ended
            for file in files:
                self._take(front, socket.socket(fileno=file))

    def _take(self, front: bytes, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.set_inheritable(False)
        task = asyncio.get_running_loop().create_task(self._hand_over(front, connection))
        self._coming[task] = front
        task.add_done_callback(self._coming.pop)

    async def _hand_over(self, front: bytes, connection: socket.socket) -> None:
        try:
            await self._fronts[front].take(connection)
        except OSError as error:  # it has gone, or does not speak TLS
            log.debug("A connection was not made: %s", error)
            connection.close()
        except asyncio.CancelledError:
            connection.close()
            raise

    def _tell_ended(self) -> None:
        coming = Counter(self._coming.values())
        for kind, front in self._fronts.items():
            ended = self._had[kind] - coming[kind] - front.open
            if ended > 0:
                try:
                    ended = self._dealer.send(kind * ended)
                except OSError:  # not now; or nobody deals, which is read
                    continue
                self._had[kind] -= ended
        self._tell = asyncio.get_running_loop().call_later(_TELL_S, self._tell_ended)
