"""Connections of one port, dealt to several processes: evenly, and whoever of them comes or goes."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from inference.oip.dealt import GRPC, HTTP
from infra.dealing import Dealer
from infra.local.server import free_port
from tests.support import eventually

T = TypeVar("T")
HOST = "127.0.0.1"
# Says to each client which process it has and what that takes it for; ready once a file is there.
WORKER = """
import asyncio, os, pathlib, socket, sys
from inference.oip.dealt import GRPC, HTTP, Dealt

class Front:
    open = 0
    async def take(self, connection):
        await asyncio.get_running_loop().connect_accepted_socket(Greeting, connection)

front = Front()

class Greeting(asyncio.Protocol):
    def connection_made(self, transport):
        front.open += 1
        transport.write(f"{os.getpid()} {transport.get_extra_info('peername')[1]}\\n".encode())
    def connection_lost(self, error):
        front.open -= 1

async def main():
    while not pathlib.Path(sys.argv[1]).exists():
        await asyncio.sleep(0.01)
    alone = asyncio.Event()
    line = socket.socket(fileno=int(os.environ["SERVE_DEALT_FD"]))
    dealt = Dealt(line, {GRPC: front, HTTP: Front()}, alone.set)
    dealt.begin()
    await alone.wait()
    await dealt.close()

asyncio.run(main())
"""


class World:
    """A dealer, its processes, and clients that stay connected."""

    def __init__(self, folder: Path, count: int) -> None:
        self.port = free_port()
        self.dealer = Dealer({GRPC: (HOST, self.port), HTTP: (HOST, free_port(self.port))}, count)
        self.ready = [folder / f"ready-{position}" for position in range(count)]
        self.processes = [self.start(position) for position in range(count)]
        self.clients: list[tuple[socket.socket, int]] = []

    def start(self, position: int) -> Any:
        command = [sys.executable, "-c", WORKER, str(self.ready[position])]
        return self.dealer.start(position, command)

    def until(self, predicate: Callable[[], T], timeout_s: float = 20.0) -> T:
        """Deal until something is so."""

        def dealt() -> T:
            self.dealer.wait(0.02)
            return predicate()

        return eventually(dealt, timeout_s)

    def connected(self) -> socket.socket | None:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((HOST, self.port), timeout=5)
        return None

    def join(self) -> int:
        """One more client, once somebody listens; which process it has."""
        client = self.until(self.connected)
        assert client is not None
        client.setblocking(False)
        told = bytearray()

        def greeted() -> bool:
            with contextlib.suppress(BlockingIOError):
                told.extend(client.recv(64))
            return told.endswith(b"\n")

        self.until(greeted)
        process, peer = map(int, told.split())
        assert peer == client.getsockname()[1], "the process sees the client's own address"
        self.clients.append((client, process))
        return process

    def leave(self, process: int) -> None:
        """The clients of a process go."""
        for client, of in self.clients:
            if of == process:
                client.close()
        self.clients = [pair for pair in self.clients if pair[1] != process]

    def end(self) -> None:
        for client, _ in self.clients:
            client.close()
        self.dealer.close()
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path, 2)
    yield made
    made.end()


def test_connections_are_spread_evenly_and_go_where_others_have_left(world: World) -> None:
    for mark in world.ready:
        mark.touch()
    counts = Counter(world.join() for _ in range(8))
    assert sorted(counts.values()) == [4, 4]
    left, _ = counts
    world.leave(left)
    # What was said of them is heard while dealing goes on.
    world.until(lambda: world.dealer.open(GRPC) == 4)
    assert [world.join() for _ in range(4)] == [left] * 4


def test_nobody_is_let_in_before_all_processes_serve(world: World) -> None:
    world.ready[0].touch()
    world.until(lambda: world.dealer.serving == 1)
    assert world.connected() is None
    world.ready[1].touch()
    assert sorted(Counter(world.join() for _ in range(2)).values()) == [1, 1]


def test_when_a_process_dies_the_others_serve_and_the_next_one_catches_up(world: World) -> None:
    for mark in world.ready:
        mark.touch()
    assert {world.join(), world.join()} == {process.pid for process in world.processes}
    dead, other = world.processes
    dead.kill()
    dead.wait()
    world.until(lambda: world.dealer.serving == 1)
    assert [world.join() for _ in range(3)] == [other.pid] * 3
    world.processes[0] = world.start(0)
    world.until(lambda: world.dealer.serving == 2)
    assert [world.join() for _ in range(3)] == [world.processes[0].pid] * 3


def test_one_that_never_comes_up_does_not_keep_the_port_closed(world: World) -> None:
    world.ready[0].touch()
    world.processes[1].kill()
    assert world.join() == world.processes[0].pid


def test_connections_wait_while_no_process_is_there(world: World) -> None:
    for mark in world.ready:
        mark.touch()
    world.join()
    for process in world.processes:
        process.kill()
        process.wait()
    world.until(lambda: world.dealer.serving == 0)
    early = world.until(world.connected)
    assert early is not None
    world.processes[1] = world.start(1)
    world.until(lambda: world.dealer.open(GRPC) == 1)
    assert int(early.recv(64).split()[0]) == world.processes[1].pid
    early.close()


def test_processes_end_when_nobody_deals_any_more(world: World) -> None:
    for mark in world.ready:
        mark.touch()
    world.join()
    world.dealer.close()
    assert [process.wait(10) for process in world.processes] == [0, 0]


def test_a_taken_port_is_said_before_anything_is_started() -> None:
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match=f"{HOST}:{port} cannot be listened at: Address already in use"):
            Dealer({GRPC: (HOST, free_port()), HTTP: (HOST, port)}, 2)
