"""A server on a socket, on both event loops: TLS, ports, and clients that leave."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest
import uvloop

from inference.http2 import frames as f
from inference.http2.limits import Limits
from inference.http2.server import Server
from tests.inference.http2.peer import PATH, Methods, Peer
from tests.inference.oip.test_tls import Authority
from tests.support import eventually_async

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def run(loop: str, story: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(story)


def contexts(folder: Path) -> tuple[ssl.SSLContext, Authority]:
    authority = Authority(folder, "authority")
    certificate, key = authority.issue("server")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    return context, authority


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("secure", [False, True])
def test_grpcio_calls_and_goes_and_the_port_is_free_again(loop: str, secure: bool, tmp_path: Path) -> None:
    context, authority = contexts(tmp_path)
    trusted = grpc.ssl_channel_credentials(authority.file.read_bytes())

    async def story() -> None:
        methods = Methods()
        server = Server(methods.table(), Limits())
        port = await server.start("127.0.0.1", 0, tls=context if secure else None)
        address = f"127.0.0.1:{port}"
        open_ = grpc.aio.secure_channel(address, trusted) if secure else grpc.aio.insecure_channel(address)
        async with open_ as channel:
            echo = channel.unary_unary(PATH + "Echo")
            contents = [b"x" * size for size in (1, 100_000, 2_000_000)]
            assert await asyncio.gather(*map(echo, contents)) == contents
            with pytest.raises(OSError, match=r"in use|Errno"):
                await Server({}, Limits()).start("127.0.0.1", port)
            held = channel.unary_unary(PATH + "Held")(b"")
            await eventually_async(lambda: methods.begun == 1)
        held.cancel()
        await eventually_async(lambda: methods.given_up == 1)
        await server.stop(1.0)
        again = Server({}, Limits())
        assert await again.start("127.0.0.1", port) == port
        await again.stop(0)

    run(loop, story())


@pytest.mark.parametrize("loop", LOOPS)
def test_over_tls_only_http2_is_spoken(loop: str, tmp_path: Path) -> None:
    context, authority = contexts(tmp_path)

    async def story() -> None:
        server = Server({}, Limits())
        port = await server.start("127.0.0.1", 0, tls=context)
        for offered, spoken in ((["h2"], True), ([], False)):
            client = ssl.create_default_context(cafile=str(authority.file))
            if offered:
                client.set_alpn_protocols(offered)
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client)
            writer.write(f.PREFACE + f.settings({}))
            first = b""
            try:
                async with asyncio.timeout(5):
                    first = await reader.read(9)
            except ConnectionError:
                pass
            assert (first[3:4] == bytes([f.SETTINGS])) == spoken
            writer.transport.abort()
        await server.stop(0)

    run(loop, story())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_client_that_never_ends_tls_is_cut_off_when_the_server_stops(loop: str, tmp_path: Path) -> None:
    context, authority = contexts(tmp_path)
    trusted = ssl.create_default_context(cafile=str(authority.file))
    trusted.set_alpn_protocols(["h2"])

    def connect(port: int, asked: bytes) -> tuple[ssl.SSLSocket, socket.socket]:
        """A client that speaks TLS, and its bare connection."""
        secured = trusted.wrap_socket(
            socket.create_connection(("127.0.0.1", port), timeout=10), server_hostname="127.0.0.1"
        )
        secured.sendall(f.PREFACE + f.settings({}) + asked)
        return secured, socket.socket(fileno=os.dup(secured.fileno()))

    def drained(bare: socket.socket) -> bool:
        """Reads without ever answering; True when the connection has ended."""
        bare.settimeout(10)
        try:
            while bare.recv(65536):
                pass
        except ConnectionError:
            pass
        return True

    async def story() -> None:
        methods = Methods()
        server = Server(methods.table(), Limits())
        port = await server.start("127.0.0.1", 0, tls=context)
        secured, bare = await asyncio.to_thread(connect, port, Peer().request(1, method="Held"))
        await eventually_async(lambda: methods.begun == 1)
        await server.stop(0)
        assert await asyncio.to_thread(drained, bare)
        bare.close()
        secured.close()

    run(loop, story())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("secure", [False, True])
def test_a_connection_that_was_accepted_elsewhere_is_served(loop: str, secure: bool, tmp_path: Path) -> None:
    context, authority = contexts(tmp_path)
    trusted = grpc.ssl_channel_credentials(authority.file.read_bytes())

    async def story() -> None:
        server = Server(Methods().table(), Limits())
        server.begin(tls=context if secure else None)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(10)
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            open_ = (
                grpc.aio.secure_channel(address, trusted) if secure else grpc.aio.insecure_channel(address)
            )
            async with open_ as channel:
                call = channel.unary_unary(PATH + "Now")(b"ab", timeout=10, wait_for_ready=True)
                accepted, _ = await asyncio.to_thread(listener.accept)
                accepted.setblocking(False)
                await server.take(accepted)
                assert await call == b"ba"
                assert server.open == 1
        await server.stop(0)
        assert server.open == 0

    run(loop, story())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_client_that_speaks_something_else_is_told_and_closed(loop: str) -> None:
    async def story() -> None:
        server = Server({}, Limits())
        port = await server.start("127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(5):
            told = await reader.read()
        assert b"not HTTP/2 with prior knowledge" in told
        writer.close()
        await server.stop(1.0)

    run(loop, story())
