"""Bytes to frames and calls: however the bytes are cut, and whatever they are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.http2 import frames as f
from inference.http2.frames import Code, ConnectionFailed, StreamFailed
from inference.http2.limits import MAX_BLOCK_BYTES, MAX_CONTINUATIONS, MAX_FRAME_BYTES
from inference.http2.walker import Walker
from tests.inference.http2.peer import Peer, drive, message

BEGIN = f.PREFACE + f.settings({})


class Seen:
    """A walker that notes what it was handed."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        kinds = (f.DATA, f.SETTINGS, f.PING, f.RST_STREAM)
        self.walker = Walker(
            {kind: self._taker(kind) for kind in kinds},
            lambda: self.events.append(("unknown",)),
            lambda *of: self.events.append(("headers", *of)),
            lambda *of: self.events.append(("failed", *of)),
        )

    def feed(self, data: bytes, *cuts: int) -> None:
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            self.walker.feed(data[start:end])

    def _taker(self, kind: int) -> Any:
        def take(flags: int, stream: int, data: bytes, at: int, end: int) -> None:
            self.events.append((kind, flags, stream, data[at:end]))
            if kind == f.RST_STREAM:
                raise StreamFailed(Code.CANCEL)

        return take


STREAM = b"".join(
    [
        BEGIN,
        f.frame(f.HEADERS, f.END_HEADERS, 1, b"block"),
        f.frame(f.DATA, f.END_STREAM, 1, b"data" * 30),
        f.frame(0xEE, 255, 7, b"nobody knows"),
        f.frame(f.HEADERS, f.END_STREAM | f.PADDED | f.PRIORITISED, 3, b"\x02\0\0\0\0\x10bl\0\0"),
        f.frame(f.CONTINUATION, 0, 3, b""),
        f.frame(f.CONTINUATION, f.END_HEADERS, 3, b"ock"),
        f.frame(f.RST_STREAM, 0, 3, b"\0\0\0\x08"),
        f.frame(f.DATA, 0, 1, b""),
    ]
)
EVENTS = [
    (f.SETTINGS, 0, 0, b""),
    ("headers", 1, False, b"block"),
    (f.DATA, f.END_STREAM, 1, b"data" * 30),
    ("unknown",),
    ("headers", 3, True, b"block"),
    (f.RST_STREAM, 0, 3, b"\0\0\0\x08"),
    ("failed", 3, Code.CANCEL),
    (f.DATA, 0, 1, b""),
]


def test_byte_by_byte_the_frames_are_those_of_the_whole() -> None:
    whole, bytewise = Seen(), Seen()
    whole.feed(STREAM)
    assert whole.events == EVENTS
    bytewise.feed(STREAM, *range(1, len(STREAM)))
    assert bytewise.events == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_cut_gives_the_same_frames(cuts: list[int]) -> None:
    seen = Seen()
    seen.feed(STREAM, *sorted(cuts))
    assert seen.events == EVENTS


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", Code.PROTOCOL_ERROR),
        (b"PRI * HTTP/2.0\r\n\r\nSX", Code.PROTOCOL_ERROR),
        (f.PREFACE + f.frame(f.PING, 0, 0, b"12345678"), Code.PROTOCOL_ERROR),
        (f.PREFACE + f.frame(f.SETTINGS, f.ACK, 0), Code.PROTOCOL_ERROR),
        (BEGIN + f.HEAD.pack((MAX_FRAME_BYTES + 1) >> 8, 1, f.DATA, 0, 1), Code.FRAME_SIZE_ERROR),
        (BEGIN + f.frame(f.HEADERS, f.END_HEADERS, 0, b"x"), Code.PROTOCOL_ERROR),
        (BEGIN + f.frame(f.HEADERS, f.PADDED, 1, b""), Code.PROTOCOL_ERROR),
        (BEGIN + f.frame(f.HEADERS, f.PADDED, 1, b"\x05abcd"), Code.PROTOCOL_ERROR),
        (BEGIN + f.frame(f.HEADERS, f.PRIORITISED, 1, b"abcd"), Code.FRAME_SIZE_ERROR),
        (BEGIN + f.frame(f.HEADERS, 0, 1) + f.frame(f.DATA, 0, 1), Code.PROTOCOL_ERROR),
        (BEGIN + f.frame(f.HEADERS, 0, 1) + f.frame(f.CONTINUATION, 0, 3), Code.PROTOCOL_ERROR),
        (BEGIN + f.frame(f.HEADERS, f.END_HEADERS, 1, bytes(MAX_BLOCK_BYTES + 1)), Code.ENHANCE_YOUR_CALM),
    ],
)
def test_what_breaks_the_framing_ends_the_connection(data: bytes, code: Code) -> None:
    with pytest.raises(ConnectionFailed) as failed:
        Seen().feed(data)
    assert failed.value.code == code


@pytest.mark.parametrize("piece", [b"", b"x" * 4_000])
def test_a_header_block_without_end_is_bounded(piece: bytes) -> None:
    seen = Seen()
    seen.feed(BEGIN + f.frame(f.HEADERS, 0, 1, piece))
    with pytest.raises(ConnectionFailed) as failed:
        for _ in range(MAX_CONTINUATIONS + 1):
            seen.feed(f.frame(f.CONTINUATION, 0, 1, piece))
    assert failed.value.code == Code.ENHANCE_YOUR_CALM


def test_nothing_is_read_once_it_is_stopped() -> None:
    seen = Seen()
    seen.feed(BEGIN)
    seen.walker.stopped = True
    seen.feed(f.frame(f.PING, 0, 0, b"12345678"))
    assert seen.events == EVENTS[:1]


# Calls of a connection ----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_cut_gives_the_same_answers(data: st.DataObject) -> None:
    async def story() -> None:
        peer = Peer(shake=False)
        sent = BEGIN + b"".join(
            [
                peer.request(1, b"first"),
                peer.opening(3, "Now", x="y"),
                peer.request(5, b"third", "Chat"),
                f.frame(f.DATA, 0, 3, message(b"second")[:7]),
                f.frame(f.DATA, f.END_STREAM, 3, message(b"second")[7:]),
                peer.request(7, b"fourth", grpc_timeout="5S"),
                peer.request(9, b"fifth"),
            ]
        )
        cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=20)))
        peer.send(*(sent[start:end] for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True)))
        await peer.settle()
        answers = {stream: peer.answer(stream) for stream in (1, 3, 5, 7, 9)}
        assert [answer.messages for answer in answers.values()] == [
            [b"first"],
            [b"dnoces"],
            [b"third", b"THIRD"],
            [b"fourth"],
            [b"fifth"],
        ]
        assert {answer.status for answer in answers.values()} == {"0"}
        assert peer.server.calls == 0

    drive(story())


def _frames() -> st.SearchStrategy[bytes]:
    """Frames that are nearly right."""
    kinds = st.sampled_from([*range(10), 99])
    flags = st.sampled_from([0, 1, 4, 5, 8, 0x20, 0x2D, 255])
    streams = st.sampled_from([0, 1, 1, 3, 3, 5, 2, 2**31 - 1])
    payloads = st.one_of(
        st.binary(max_size=40),
        st.sampled_from([b"\0\0\0\0\0", b"\x83\x86\x84", message(b"x"), b"\0\0\0\x01", b"12345678"]),
    )
    return st.builds(f.frame, kinds, flags, streams, payloads)


@settings(max_examples=200, deadline=None)
@given(st.booleans(), st.lists(st.one_of(_frames(), st.binary(max_size=60)), max_size=12))
def test_any_bytes_end_in_an_answer_or_a_goaway_and_leave_nothing(call: bool, pieces: list[bytes]) -> None:
    async def story() -> None:
        peer = Peer()
        if call:
            peer.send(peer.opening(1, "Held"))
        peer.send(*pieces)
        await peer.settle()
        peer.lose()
        await peer.settle()
        assert peer.server.calls == 0
        assert peer.methods.begun == peer.methods.given_up

    drive(story())
