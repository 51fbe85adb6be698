"""gRPC's calls: messages, compression, statuses, deadlines, by hand and by grpcio."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator

import grpc
import pytest

from inference.http2 import frames as f
from inference.http2.frames import Code
from inference.http2.limits import MAX_UNSENT_BYTES, Limits
from inference.http2.server import Server
from tests.inference.http2.peer import PATH, Methods, Peer, message
from tests.support import eventually_async

SMALL = 1_000


def body(stream: int, content: bytes) -> bytes:
    return f.frame(f.DATA, f.END_STREAM, stream, content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the method takes one message"),
        (b"\0\0", "the last message is not whole"),
        (message(b"cut")[:-1], "the last message is not whole"),
        (message(b"one") + message(b"two"), "the method takes one message"),
        (message(b"one") + b"\0", "the method takes one message"),
        (message(b"x", flag=2), "a message is compressed or not, its flag is 2"),
        (message(b"x", flag=1), "a message is compressed, the headers do not say how"),
    ],
)
@pytest.mark.parametrize("method", ["Echo", "Now"])
async def test_what_is_no_message_is_a_sentence(method: str, content: bytes, words: str) -> None:
    peer = Peer()
    peer.send(peer.opening(1, method), body(1, content))
    await peer.settle()
    answer = peer.answer(1)
    assert (answer.status, answer.words) == ("13", words)
    peer.send(peer.opening(3, method, flags=f.END_HEADERS | f.END_STREAM))
    assert peer.answer(3).words == "the method takes one message"
    assert peer.server.calls == 0


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_compressed_messages_are_read_and_bounded(encoding: str, compress: object) -> None:
    peer = Peer(max_message_bytes=SMALL)

    async def ask(stream: int, content: bytes) -> tuple[str | None, list[bytes]]:
        peer.send(peer.opening(stream, grpc_encoding=encoding), body(stream, message(content, flag=1)))
        await peer.settle()
        answer = peer.answer(stream)
        return answer.status, answer.messages

    assert await ask(1, compress(b"x" * SMALL)) == ("0", [b"x" * SMALL])  # type: ignore[operator]
    assert await ask(3, compress(b"x" * 10**6)[:SMALL]) == ("8", [])  # type: ignore[operator]
    assert await ask(5, b"not compressed") == ("13", [])
    assert await ask(7, compress(b"hello")[:-1]) == ("13", [])  # type: ignore[operator]
    assert await ask(9, compress(b"hello") + b"!") == ("13", [])  # type: ignore[operator]
    peer.send(peer.opening(11, grpc_encoding=encoding), body(11, message(b"plain")))
    await peer.settle()
    assert peer.answer(11).messages == [b"plain"]


async def test_a_message_beyond_the_limit_is_refused_before_it_is_there() -> None:
    peer = Peer(max_message_bytes=SMALL)
    assert (await peer.ask(1, b"x" * SMALL)).status == "0"
    assert (await peer.ask(3, b"x" * (SMALL + 1))).status == "8"
    peer.send(peer.opening(5), f.frame(f.DATA, 0, 5, message(b"x" * (SMALL + 1))[:5]))
    answer = peer.answer(5)
    assert (answer.status, answer.words, answer.reset) == (
        "8",
        "a message may have 1000 bytes",
        Code.NO_ERROR,
    )


async def test_requests_that_are_not_whole_have_a_bound_together() -> None:
    peer = Peer(max_message_bytes=SMALL)
    for stream in (1, 3, 5):
        peer.send(peer.opening(stream), f.frame(f.DATA, 0, stream, message(b"x" * SMALL)[:-1]))
    answer = peer.answer(5)
    assert (answer.status, answer.reset) == ("8", Code.NO_ERROR)
    peer.send(body(1, b"x"))
    await peer.settle()
    assert peer.answer(1).status == "0"
    # There is room again.
    peer.send(peer.opening(7), f.frame(f.DATA, 0, 7, message(b"x" * SMALL)[:-1]), body(7, b"x"))
    await peer.settle()
    assert peer.answer(7).status == "0"


async def test_messages_of_a_stream_are_answered_as_they_come() -> None:
    peer = Peer()
    peer.send(peer.opening(1, "Chat"), f.frame(f.DATA, 0, 1, message(b"one") + message(b"two")[:3]))
    assert peer.answer(1).messages == [b"one", b"ONE"]
    peer.send(f.frame(f.DATA, 0, 1, message(b"two")[3:]))
    assert peer.answer(1).messages == [b"two", b"TWO"]
    peer.send(body(1, b""))
    assert peer.answer(1).head == {"grpc-status": "0"}
    peer.send(peer.opening(3, "Chat"), body(3, message(b"x") + b"\0"))
    assert peer.answer(3).trailers["grpc-message"] == "the last message is not whole"


async def test_a_stream_whose_answers_are_not_read_ends() -> None:
    peer = Peer()
    peer.send(peer.opening(1, "Chat"), f.settings({f.INITIAL_WINDOW: 0}))
    for _ in range(MAX_UNSENT_BYTES // 20_000 + 1):
        peer.send(f.frame(f.DATA, 0, 1, message(b"x" * 10_000)))
    answer = peer.answer(1)
    assert (answer.body, answer.trailers["grpc-status"]) == (b"", "8")
    assert peer.connection.outbox.waiting_bytes == 0


async def test_what_fails_has_its_status_its_words_and_when_to_come_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    peer = Peer()
    answer = await peer.ask(1, "naïve 100%\n".encode(), "Refuse")
    assert answer.head == {
        ":status": "200",
        "content-type": "application/grpc",
        "grpc-status": "8",
        "grpc-message": "na%C3%AFve 100%25%0A",
        "grpc-retry-pushback-ms": "250",
    }
    answer = await peer.ask(3, b"x", "Break")
    assert (answer.status, answer.words) == ("13", "the server failed; its log says how")
    assert "ZeroDivisionError: inside" in caplog.text
    answer = await peer.ask(5, b"x", "Cancel")
    assert (answer.status, answer.words) == ("1", "the server gave the call up")
    assert peer.server.calls == 0


async def test_a_deadline_is_told_and_kept() -> None:
    peer = Peer()
    assert (await peer.ask(1, grpc_timeout="5S")).status == "0"
    assert (await peer.ask(3)).status == "0"
    left_s, without = peer.methods.left_s
    assert left_s == pytest.approx(5.0, abs=0.5)
    assert without is None
    peer.send(peer.request(5, method="Held", grpc_timeout="2S"), peer.opening(7, grpc_timeout="2S"))
    peer.send(peer.request(9, method="Held", grpc_timeout="1H"))
    await peer.settle()
    now_s = asyncio.get_running_loop().time()
    peer.connection.look(now_s + 1)
    assert peer.answer(5).status is None
    peer.connection.look(now_s + 3)
    await peer.settle()
    assert peer.answer(5).status == "4"
    answer = peer.answer(7)
    assert (answer.status, answer.reset) == ("4", Code.NO_ERROR)
    assert peer.methods.given_up == 1
    assert peer.answer(9).status is None


async def test_a_call_that_is_given_up_is_cancelled_and_has_no_answer() -> None:
    peer = Peer()
    for stream in (1, 3):
        peer.send(peer.request(stream, method="Held"))
    await peer.settle()
    peer.send(f.frame(f.RST_STREAM, 0, 1, Code.CANCEL.to_bytes(4, "big")))
    await peer.settle()
    assert peer.methods.given_up == 1
    peer.lose()
    await peer.settle()
    assert peer.methods.given_up == 2
    assert peer.said(f.HEADERS) == []
    assert peer.server.calls == 0


# grpcio -------------------------------------------------------------------------------------------


class Served:
    def __init__(self, methods: Methods, server: Server, port: int) -> None:
        self.methods = methods
        self.server = server
        self.address = f"127.0.0.1:{port}"


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    methods = Methods()
    server = Server(methods.table(), Limits(max_message_bytes=8 * 2**20))
    port = await server.start("127.0.0.1", 0)
    yield Served(methods, server, port)
    await server.stop(0)


async def test_grpcio_gets_large_answers_of_many_calls_at_once(served: Served) -> None:
    contents = [bytes([number]) * (1 + 40_000 * number) for number in range(20)]
    options = [("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(served.address, options) as channel:
        echo = channel.unary_unary(PATH + "Echo")
        for _ in range(3):
            assert await asyncio.gather(*(echo(content) for content in contents)) == contents
        large = b"x" * 5_000_000
        assert await echo(large) == large
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await echo(b"x" * (8 * 2**20 + 1))
    assert told.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_grpcio_may_compress(served: Served, compression: grpc.Compression) -> None:
    async with grpc.aio.insecure_channel(served.address, compression=compression) as channel:
        assert await channel.unary_unary(PATH + "Echo")(b"x" * 100_000) == b"x" * 100_000


async def test_grpcio_hears_statuses_words_and_metadata(served: Served) -> None:
    async with grpc.aio.insecure_channel(served.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await channel.unary_unary(PATH + "Refuse")("naïve 100%".encode())
        assert told.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert told.value.details() == "naïve 100%"
        assert told.value.trailing_metadata()["grpc-retry-pushback-ms"] == "250"
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await channel.unary_unary(PATH + "Nobody")(b"")
        assert told.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_grpcio_streams_and_metadata_of_many_sizes(served: Served) -> None:
    async with grpc.aio.insecure_channel(served.address) as channel:
        call = channel.stream_stream(PATH + "Chat")(iter([b"one", b"two"]))
        assert [answer async for answer in call] == [b"one", b"ONE", b"two", b"TWO"]
        echo = channel.unary_unary(PATH + "Echo")
        for size in (1, 1_000, 8_000, 1, 8_000):
            assert await echo(b"x", metadata=[("trace", "é".encode().hex() * (size // 4))]) == b"x"


async def test_a_grpcio_deadline_and_a_lost_client_give_the_call_up(served: Served) -> None:
    channel = grpc.aio.insecure_channel(served.address)
    held = channel.unary_unary(PATH + "Held")
    with pytest.raises(grpc.aio.AioRpcError) as told:
        await held(b"", timeout=0.05)
    assert told.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually_async(lambda: served.methods.given_up == 1)
    calls = [held(b"") for _ in range(5)]
    await eventually_async(lambda: served.methods.begun == 6)
    for call in calls:
        call.cancel()
    await channel.close()
    await eventually_async(lambda: served.methods.given_up == 6)
    assert served.server.calls == 0


async def test_a_drain_answers_what_is_in_hand_and_grpcio_goes_elsewhere(served: Served) -> None:
    async with grpc.aio.insecure_channel(served.address) as channel:
        held = channel.unary_unary(PATH + "Held")(b"last")
        await eventually_async(lambda: served.methods.begun == 1)
        leaving = asyncio.create_task(served.server.stop(5.0))
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await channel.unary_unary(PATH + "Echo")(b"", timeout=2)
        assert told.value.code() is grpc.StatusCode.UNAVAILABLE
        served.methods.release.set()
        assert await held == b"last"
        await leaving
