"""Listens for several processes, and hands each connection to the one that has fewest.

Left to the system (SO_REUSEPORT), connections go by a hash of their addresses: of eight, one of two
processes may have six, and is full while the other is half idle. Their side is `inference.oip.dealt`.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from inference.oip.dealt import READY
from infra.supervise import Beside

log = logging.getLogger(__name__)

FD_VARIABLE: Final = "SERVE_DEALT_FD"
_BACKLOG: Final = 512
# When a connection cannot be accepted, for want of files, say.
_PAUSE_S: Final = 0.05


@dataclass(slots=True, eq=False)
class _Worker:
    """One that runs: whether it takes connections, and how many it has of each front."""

    line: socket.socket
    ready: bool = False
    open: Counter[bytes] = field(default_factory=Counter)


class Dealer(Beside):
    """Starts processes, and deals while it waits for them to end.

    The ports are this process's own from the beginning. It listens once every process has said that it
    serves, or has ended once: whoever comes first does not meet the first one only. A process that dies
    takes its own connections along; while there is none, connections wait.
    """

    def __init__(self, fronts: Mapping[bytes, tuple[str, int]], count: int) -> None:
        """Host and port of each front; `count` processes will be started. Raises `OSError` where a port is
        taken."""
        self._selector = selectors.DefaultSelector()
        self._workers: dict[int, _Worker] = {}
        self._late = set(range(count))  # have neither been ready nor ended
        self._accepting = False
        self._listeners: list[tuple[socket.socket, bytes]] = []
        try:
            for front, (host, port) in fronts.items():
                self._listeners += [(listener, front) for listener in _bound(host, port)]
        except OSError:
            self.close()
            raise

    @property
    def serving(self) -> int:
        """How many processes take connections."""
        return sum(worker.ready for worker in self._workers.values())

    def open(self, front: bytes) -> int:
        """How many connections of a front there are, as far as was told."""
        return sum(worker.open[front] for worker in self._workers.values())

    def start(self, position: int, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """The process at a position, instead of the one that was there."""
        if position in self._workers:
            self._part(position)
        ours, theirs = socket.socketpair()
        with theirs:
            told = {**os.environ, FD_VARIABLE: str(theirs.fileno())}
            process = subprocess.Popen(list(command), env=told, pass_fds=(theirs.fileno(),))
        ours.setblocking(False)
        self._workers[position] = _Worker(ours)
        self._selector.register(ours, selectors.EVENT_READ, position)
        return process

    def wait(self, seconds: float) -> None:
        """Deal for so long."""
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            for key, _ in self._selector.select(left_s):
                if isinstance(key.data, int):
                    self._hear(key.data)
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._accept(key.fileobj, key.data)

    def close(self) -> None:
        """Listen no more. The processes know; connections they have stay."""
        for listener, _ in self._listeners:
            listener.close()
        for worker in self._workers.values():
            worker.line.close()
        self._selector.close()

    def _hear(self, position: int) -> None:
        worker = self._workers.get(position)
        if worker is None:
            return
        try:
            said = worker.line.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if not said:
            self._part(position)
            return
        if READY in said:
            worker.ready = True
            self._late.discard(position)
            self._accept_or_not()
        worker.open.subtract(bytes([byte]) for byte in said.replace(READY, b""))

    def _part(self, position: int) -> None:
        """A process takes no more connections."""
        worker = self._workers.pop(position)
        self._selector.unregister(worker.line)
        worker.line.close()
        self._late.discard(position)
        self._accept_or_not()

    def _accept_or_not(self) -> None:
        able = not self._late and self.serving > 0
        if able == self._accepting:
            return
        self._accepting = able
        for listener, front in self._listeners:
            if able:
                listener.listen(_BACKLOG)
                self._selector.register(listener, selectors.EVENT_READ, front)
            else:
                self._selector.unregister(listener)

    def _accept(self, listener: socket.socket, front: bytes) -> None:
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            log.warning("A connection cannot be accepted: %s", error)
            time.sleep(_PAUSE_S)
            return
        with connection:
            self._deal(connection, front)

    def _deal(self, connection: socket.socket, front: bytes) -> None:
        """To the process with the fewest of this front, of all fronts where that is even. One that does not
        read what it is dealt is passed over."""
        able = (worker for worker in self._workers.values() if worker.ready)
        for worker in sorted(able, key=lambda one: (one.open[front], one.open.total())):
            with suppress(OSError):
                socket.send_fds(worker.line, [front], [connection.fileno()])
                worker.open[front] += 1
                return
        log.warning("A connection was closed: no process takes it")


def _bound(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of the host, listening at none yet."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            one = socket.socket(family, kind, protocol)
        except OSError:  # the name has an address of a kind that this machine lacks
            continue
        sockets.append(one)
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind(address)
            one.setblocking(False)
        except OSError as error:
            for earlier in sockets:
                earlier.close()
            raise OSError(f"{host}:{port} cannot be listened at: {error.strerror}") from error
    return sockets
