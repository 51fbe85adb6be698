"""HTTP/2 by hand: windows, states, and what is answered to whom."""

from __future__ import annotations

import asyncio

import pytest

from inference.http2 import frames as f
from inference.http2.frames import Code
from inference.http2.limits import CONNECTION_WINDOW, MAX_FRAME_BYTES, MAX_METADATA_BYTES, STREAM_WINDOW
from tests.inference.http2.peer import Peer, message

HEADERS_END = f.END_HEADERS | f.END_STREAM


def window(*streams: int, more: int) -> bytes:
    return b"".join(f.window_update(stream, more) for stream in streams)


async def test_a_call_is_answered_in_one_write_of_three_frames() -> None:
    peer = Peer()
    peer.send(peer.request(1), peer.request(3, b"again"))
    await peer.settle()
    kinds = [(kind, flags, stream) for kind, flags, stream, _ in peer.frames if stream]
    one = [(f.HEADERS, f.END_HEADERS), (f.DATA, 0), (f.HEADERS, f.END_HEADERS | f.END_STREAM)]
    assert kinds == [(*frame, stream) for stream in (1, 3) for frame in one]
    answer = peer.answer(1)
    assert answer.head == {":status": "200", "content-type": "application/grpc"}
    assert answer.messages == [b"hello"]
    assert answer.trailers == {"grpc-status": "0"}
    assert peer.server.calls == 0


async def test_what_several_calls_answer_leaves_at_once() -> None:
    peer = Peer()
    await peer.settle()
    for stream in (1, 3, 5):
        peer.send(peer.request(stream, method="Held"))
    await peer.settle()
    writes: list[bytes] = []
    peer.write = writes.append  # type: ignore[method-assign,assignment]
    peer.methods.release.set()
    await peer.settle()
    assert len(writes) == 1


async def test_settings_are_said_and_acknowledged() -> None:
    peer = Peer(max_streams=7)
    await peer.settle()
    (first, acknowledged) = peer.said(f.SETTINGS)
    assert dict(f.SETTING.iter_unpack(first[2])) == {
        f.MAX_STREAMS: 7,
        f.INITIAL_WINDOW: STREAM_WINDOW,
        f.MAX_FRAME: MAX_FRAME_BYTES,
        f.MAX_HEADER_LIST: MAX_METADATA_BYTES,
    }
    assert acknowledged == (f.ACK, 0, b"")
    ((_, stream, more),) = peer.said(f.WINDOW_UPDATE)
    assert (stream, int.from_bytes(more, "big")) == (0, CONNECTION_WINDOW - f.DEFAULT_WINDOW)
    peer.send(f.frame(f.PING, 0, 0, b"12345678"))
    assert peer.said(f.PING) == [(f.ACK, 0, b"12345678")]


async def test_padding_priority_and_unknown_frames_change_nothing() -> None:
    peer = Peer()
    block = peer.head()
    padded = b"\x03" + b"\0\0\0\0\x10" + block + b"\0\0\0"
    peer.send(
        f.frame(f.PRIORITY, 0, 9, b"\0\0\0\0\x10"),
        f.frame(f.HEADERS, f.END_HEADERS | f.PADDED | f.PRIORITISED, 1, padded),
        f.frame(0x77, 255, 1, b"?"),
        f.frame(f.DATA, f.PADDED, 1, b"\x02" + message(b"hello")[:6] + b"\0\0"),
        f.frame(f.DATA, 0, 1),
        f.frame(f.DATA, f.PADDED | f.END_STREAM, 1, b"\x00" + message(b"hello")[6:]),
    )
    await peer.settle()
    assert peer.answer(1).messages == [b"hello"]


async def test_trailers_of_a_request_end_it() -> None:
    peer = Peer()
    peer.send(peer.opening(1), f.frame(f.DATA, 0, 1, message(b"hello")))
    peer.send(f.frame(f.HEADERS, HEADERS_END, 1, bytes(peer.encoder.encode([("x", "y")]))))
    await peer.settle()
    assert peer.answer(1).messages == [b"hello"]
    # The table they changed is the table the next block is read with.
    assert (await peer.ask(3, x="y")).status == "0"


# Windows ------------------------------------------------------------------------------------------


async def test_a_large_answer_waits_for_both_windows_and_fits_the_frames() -> None:
    peer = Peer()
    content = bytes(range(256)) * 400
    peer.send(peer.opening(1))
    for at in range(0, len(message(content)), 16_384):
        piece = message(content)[at : at + 16_384]
        peer.send(f.frame(f.DATA, f.END_STREAM if at + 16_384 >= len(content) + 5 else 0, 1, piece))
    await peer.settle()
    first = peer.said(f.DATA)
    assert sum(len(payload) for _, _, payload in first) == f.DEFAULT_WINDOW
    assert max(len(payload) for _, _, payload in first) == f.DEFAULT_FRAME
    peer.send(window(1, more=1_000_000))
    await peer.settle()
    assert peer.said(f.DATA) == []  # the connection's is used up
    peer.send(window(0, more=10_000))
    await peer.settle()
    second = peer.said(f.DATA)
    assert sum(len(payload) for _, _, payload in second) == 10_000
    peer.send(window(0, more=1_000_000))
    await peer.settle()
    answer = peer.answer(1)
    whole = b"".join(payload for _, _, payload in [*first, *second]) + answer.body
    assert whole == message(content)
    assert answer.trailers == {"grpc-status": "0"}
    assert peer.server.calls == 0


async def test_settings_change_the_windows_of_streams_that_are_open() -> None:
    peer = Peer()
    peer.send(f.settings({f.INITIAL_WINDOW: 0}), peer.request(1, b"hello"), peer.request(3, b"there"))
    await peer.settle()
    assert peer.said(f.DATA) == []
    peer.send(window(3, more=4))
    assert [payload for _, _, payload in peer.said(f.DATA)] == [message(b"there")[:4]]
    peer.send(f.settings({f.INITIAL_WINDOW: 3}))
    told = {stream: payload for _, stream, payload in peer.said(f.DATA)}
    assert told == {1: message(b"hello")[:3], 3: message(b"there")[4:7]}
    peer.send(f.settings({f.INITIAL_WINDOW: 0}), window(1, more=3))
    assert peer.said(f.DATA) == []  # 1 is at 0 again
    peer.send(f.settings({f.INITIAL_WINDOW: 100}))
    assert {stream: payload for _, stream, payload in peer.said(f.DATA)} == {
        1: message(b"hello")[3:],
        3: message(b"there")[7:],
    }


async def test_frames_may_grow_when_the_client_says_so() -> None:
    peer = Peer()
    peer.send(f.settings({f.MAX_FRAME: 2**24 - 1}), peer.request(1, b"x" * 40_000))
    await peer.settle()
    assert [len(payload) for _, _, payload in peer.said(f.DATA)] == [40_005]


async def test_what_was_taken_may_be_sent_again() -> None:
    peer = Peer(max_message_bytes=8 * 2**20)
    content = message(b"x" * (4 * 2**20))
    await peer.settle()
    peer.said(f.WINDOW_UPDATE)
    peer.send(peer.opening(1))
    # Never more than the windows allow.
    left = {0: CONNECTION_WINDOW, 1: STREAM_WINDOW}
    for at in range(0, len(content), 50_000):
        piece = content[at : at + 50_000]
        left = {stream: bytes_ - len(piece) for stream, bytes_ in left.items()}
        assert min(left.values()) >= 0
        peer.send(f.frame(f.DATA, f.END_STREAM if at + 50_000 >= len(content) else 0, 1, piece))
        for _, stream, more in peer.said(f.WINDOW_UPDATE):
            left[stream] += int.from_bytes(more, "big")
    peer.send(window(0, 1, more=8 * 2**20))
    await peer.settle()
    assert len(peer.answer(1).body) == len(content)


# States -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (lambda peer: f.frame(f.DATA, 0, 0, b"x"), Code.PROTOCOL_ERROR),
        (lambda peer: f.frame(f.DATA, 0, 5, b"x"), Code.PROTOCOL_ERROR),
        (lambda peer: f.frame(f.DATA, f.PADDED, 1, b"\x05abc"), Code.PROTOCOL_ERROR),
        (lambda peer: peer.opening(2), Code.PROTOCOL_ERROR),
        (lambda peer: f.frame(f.HEADERS, HEADERS_END, 3, b"\xff\xff\xff\xff"), Code.COMPRESSION_ERROR),
        (lambda peer: f.frame(f.RST_STREAM, 0, 5, bytes(4)), Code.PROTOCOL_ERROR),
        (lambda peer: f.frame(f.RST_STREAM, 0, 1, bytes(3)), Code.FRAME_SIZE_ERROR),
        (lambda peer: f.frame(f.PRIORITY, 0, 0, bytes(5)), Code.PROTOCOL_ERROR),
        (lambda peer: f.frame(f.PUSH_PROMISE, 0, 1, bytes(4)), Code.PROTOCOL_ERROR),
        (lambda peer: f.frame(f.CONTINUATION, f.END_HEADERS, 1, b""), Code.PROTOCOL_ERROR),
        (lambda peer: f.frame(f.PING, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
        (lambda peer: f.frame(f.PING, 0, 0, bytes(7)), Code.FRAME_SIZE_ERROR),
        (lambda peer: f.frame(f.SETTINGS, 0, 1, b""), Code.PROTOCOL_ERROR),
        (lambda peer: f.frame(f.SETTINGS, 0, 0, bytes(5)), Code.FRAME_SIZE_ERROR),
        (lambda peer: f.frame(f.SETTINGS, f.ACK, 0, bytes(6)), Code.FRAME_SIZE_ERROR),
        (lambda peer: f.settings({f.ENABLE_PUSH: 2}), Code.PROTOCOL_ERROR),
        (lambda peer: f.settings({f.MAX_FRAME: 16_383}), Code.PROTOCOL_ERROR),
        (lambda peer: f.settings({f.INITIAL_WINDOW: 2**31}), Code.FLOW_CONTROL_ERROR),
        (lambda peer: f.settings(dict.fromkeys(range(100, 165), 1)), Code.ENHANCE_YOUR_CALM),
        (lambda peer: window(0, more=0), Code.PROTOCOL_ERROR),
        (lambda peer: window(7, more=1), Code.PROTOCOL_ERROR),
        (lambda peer: window(0, more=2**31 - 1), Code.FLOW_CONTROL_ERROR),
        (lambda peer: f.frame(f.WINDOW_UPDATE, 0, 0, bytes(3)), Code.FRAME_SIZE_ERROR),
        (lambda peer: f.frame(f.GOAWAY, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
    ],
)
async def test_a_broken_rule_of_the_connection_ends_it(sent: object, code: Code) -> None:
    peer = Peer()
    peer.send(peer.opening(1, "Held"), f.frame(f.DATA, 0, 1, message(b"x")))
    assert peer.server.calls == 1
    peer.send(sent(peer))  # type: ignore[operator]
    told = peer.goaway()
    assert told is not None
    assert told[0] == code
    assert peer.half_closed
    assert peer.server.calls == 0
    peer.send(peer.request(3))  # nobody listens any more
    await peer.settle()
    assert peer.said(f.HEADERS) == []


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (lambda peer: f.frame(f.DATA, 0, 1, b"more"), Code.STREAM_CLOSED),
        (lambda peer: f.frame(f.HEADERS, HEADERS_END, 1, b""), Code.STREAM_CLOSED),
        (lambda peer: window(1, more=0), Code.PROTOCOL_ERROR),
        (lambda peer: window(1, more=2**31 - 1), Code.FLOW_CONTROL_ERROR),
        (lambda peer: f.frame(f.PRIORITY, 0, 1, bytes(4)), Code.FRAME_SIZE_ERROR),
    ],
)
async def test_a_broken_rule_of_a_stream_ends_that_one(sent: object, code: Code) -> None:
    peer = Peer()
    peer.send(peer.request(1, method="Held"), peer.request(3))
    await peer.settle()
    peer.send(sent(peer))  # type: ignore[operator]
    await peer.settle()
    assert peer.answer(1).reset == code
    assert peer.methods.given_up == 1
    assert peer.answer(3).status == "0"
    assert (await peer.ask(5)).status == "0"


async def test_headers_that_make_no_request_end_their_stream() -> None:
    peer = Peer()
    assert (await peer.ask(1, connection="close")).reset == Code.PROTOCOL_ERROR
    assert (await peer.ask(3)).status == "0"


async def test_trailers_that_do_not_end_the_request_end_the_stream() -> None:
    peer = Peer()
    peer.send(peer.opening(1), f.frame(f.HEADERS, f.END_HEADERS, 1, b""))
    assert peer.answer(1).reset == Code.PROTOCOL_ERROR


async def test_a_stream_that_was_answered_is_closed() -> None:
    peer = Peer()
    assert (await peer.ask(1)).status == "0"
    peer.send(window(1, more=5), f.frame(f.RST_STREAM, 0, 1, bytes(4)))
    assert peer.frames == [frame for frame in peer.frames if frame[2] == 0]
    peer.send(f.frame(f.DATA, 0, 1, b"late"))
    assert peer.answer(1).reset == Code.STREAM_CLOSED
    peer.send(f.frame(f.HEADERS, f.END_HEADERS, 3, peer.head()), f.frame(f.RST_STREAM, 0, 3, bytes(4)))
    peer.send(f.frame(f.HEADERS, HEADERS_END, 3, peer.head()))
    assert peer.goaway() == (Code.STREAM_CLOSED, "headers for a stream that is closed")


async def test_what_comes_for_a_stream_that_was_refused_is_dropped() -> None:
    peer = Peer()
    peer.send(peer.opening(1, "Nobody"))
    answer = peer.answer(1)
    assert (answer.status, answer.reset) == ("12", Code.NO_ERROR)
    peer.send(f.frame(f.DATA, 0, 1, b"more"), f.frame(f.HEADERS, HEADERS_END, 1, b""))
    assert peer.answer(1).reset is None
    assert (await peer.ask(3)).status == "0"


async def test_streams_beyond_the_limit_are_refused_and_may_come_again() -> None:
    peer = Peer(max_streams=2)
    peer.send(peer.request(1, method="Held"), peer.request(3, method="Held"), peer.request(5))
    await peer.settle()
    assert peer.answer(5).reset == Code.REFUSED_STREAM
    peer.methods.release.set()
    await peer.settle()
    assert peer.answer(1).status == "0"
    assert (await peer.ask(7)).status == "0"


async def test_calls_of_all_connections_have_a_limit() -> None:
    first = Peer(max_calls=2)
    second = Peer(server=first.server)
    first.send(first.request(1, method="Held"), first.request(3, method="Held"))
    await first.settle()
    answer = await second.ask(1)
    assert (answer.status, answer.words) == ("8", "the server has as many calls as it may have")
    first.lose()
    assert (await second.ask(3)).status == "0"


async def test_a_client_that_says_goodbye_hears_its_answers() -> None:
    peer = Peer()
    peer.send(peer.request(1, method="Held"), f.goaway(0, Code.NO_ERROR))
    await peer.settle()
    assert not peer.half_closed
    peer.methods.release.set()
    await peer.settle()
    assert peer.answer(1).status == "0"
    assert peer.half_closed


async def test_a_server_that_leaves_answers_what_it_has_and_takes_nothing() -> None:
    peer = Peer()
    peer.send(peer.request(1, method="Held"))
    await peer.settle()
    peer.connection.leave()
    peer.send(peer.request(3), peer.request(5))
    await peer.settle()
    ((_, _, goodbye),) = peer.said(f.GOAWAY)
    assert goodbye == (1).to_bytes(4, "big") + bytes(4)
    assert peer.said(f.HEADERS) == []
    peer.methods.release.set()
    await peer.settle()
    assert peer.answer(1).status == "0"
    assert peer.half_closed


async def test_a_server_that_must_leave_fails_what_it_has() -> None:
    peer = Peer()
    peer.send(peer.request(1, method="Held"))
    await peer.settle()
    peer.connection.end()
    assert peer.answer(1).status == "14"
    assert peer.closed
    await asyncio.sleep(0)
    assert peer.methods.given_up == 1
