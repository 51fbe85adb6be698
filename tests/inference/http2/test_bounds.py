"""Clients that flood, hoard, hang or are gone: each meets its number, and who behaves does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from inference.http2 import frames as f
from inference.http2.frames import Code
from inference.http2.limits import (
    GIVEN_UP_KEPT,
    IDLE_PING_INTERVAL_S,
    MAX_IDLE_FRAMES,
    MAX_METADATA_BYTES,
    MAX_PING_STRIKES,
    RESETS_AT_ONCE,
    RESETS_PER_S,
)
from inference.http2.manners import Pings, Resets
from inference.http2.streams import Streams
from tests.inference.http2.peer import Peer, message
from tests.support import eventually_async

CANCEL = Code.CANCEL.to_bytes(4, "big")


def reset(stream: int) -> bytes:
    return f.frame(f.RST_STREAM, 0, stream, CANCEL)


async def test_calls_that_are_given_up_as_fast_as_they_are_made_end_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("inference.http2.manners.RESETS_PER_S", 0.0)  # however slow this machine is
    peer = Peer()
    for call in range(RESETS_AT_ONCE + 200):
        stream = 2 * call + 1
        peer.send(peer.request(stream, method="Held") + reset(stream))
        if peer.half_closed:
            break
    assert peer.goaway() == (Code.ENHANCE_YOUR_CALM, "too many calls are given up")
    assert call == RESETS_AT_ONCE
    await peer.settle()
    assert peer.methods.begun == peer.methods.given_up
    assert peer.server.calls == 0


def test_a_client_under_its_rate_of_resets_may_go_on() -> None:
    resets, now_s = Resets(100.0), 100.0
    for _ in range(10 * RESETS_AT_ONCE):
        now_s += 1.01 / RESETS_PER_S
        assert resets.allowed(now_s)
    assert all(resets.allowed(now_s) for _ in range(RESETS_AT_ONCE - 1))
    assert not resets.allowed(now_s)


FLOODS: dict[str, Callable[[Peer], bytes]] = {
    "settings": lambda peer: f.settings({}),
    "acknowledgements": lambda peer: f.frame(f.SETTINGS, f.ACK, 0),
    "pings back": lambda peer: f.frame(f.PING, f.ACK, 0, bytes(8)),
    "priorities": lambda peer: f.frame(f.PRIORITY, 0, 1, bytes(5)),
    "windows": lambda peer: f.window_update(0, 1),
    "windows of a stream": lambda peer: f.window_update(1, 1),
    "nothing": lambda peer: f.frame(f.DATA, 0, 1),
    "padding": lambda peer: f.frame(f.DATA, f.PADDED, 1, b"\x03\0\0\0"),
    "nobody's frames": lambda peer: f.frame(0x99, 0, 0),
    "resets of nothing": lambda peer: reset(3),
    "data for a stream that is gone": lambda peer: f.frame(f.DATA, 0, 3, b"x"),
}


@pytest.mark.parametrize("what", FLOODS)
async def test_frames_that_ask_for_nothing_are_bounded(what: str) -> None:
    peer = Peer()
    peer.send(peer.opening(1, "Held"), peer.opening(3, "Held"), reset(3))
    flood = FLOODS[what](peer)
    for _ in range(MAX_IDLE_FRAMES - 10):
        peer.send(flood)
    assert not peer.half_closed
    # A request between makes up for them.
    assert (await peer.ask(5)).status == "0"
    for _ in range(MAX_IDLE_FRAMES - 10):
        peer.send(flood)
    assert not peer.half_closed
    peer.send(flood * 20)
    told = peer.goaway()
    assert told is not None
    assert told[0] == Code.ENHANCE_YOUR_CALM


async def test_pings_that_come_too_soon_end_the_connection_and_answers_make_up_for_them() -> None:
    peer = Peer()
    ping = f.frame(f.PING, 0, 0, bytes(8))
    for stream in (1, 3, 5):
        peer.send(ping * (MAX_PING_STRIKES + 1))
        assert (await peer.ask(stream)).status == "0"
    assert len(peer.said(f.PING)) == 3 * (MAX_PING_STRIKES + 1)
    peer.send(ping * (MAX_PING_STRIKES + 2))
    assert peer.goaway() == (Code.ENHANCE_YOUR_CALM, "too_many_pings")


def test_how_soon_is_too_soon_depends_on_whether_there_are_calls() -> None:
    pings = Pings(10.0)
    assert all(pings.allowed(now_s, True, 0) for now_s in range(0, 1_000, 10))
    assert [pings.allowed(1_000.0 + now_s, True, 0) for now_s in (0, 1, 2, 3)] == [True, True, True, False]
    pings = Pings(10.0)
    assert all(pings.allowed(now * IDLE_PING_INTERVAL_S, False, 0) for now in range(10))
    later_s = 9 * IDLE_PING_INTERVAL_S
    assert [pings.allowed(later_s + 60 * now, False, 0) for now in (1, 2, 3)] == [True, True, False]
    assert pings.allowed(later_s + 240, False, 1)


async def test_metadata_has_a_limit_that_is_a_status_and_one_that_is_the_end() -> None:
    peer = Peer()
    assert (await peer.ask(1, x="v" * (MAX_METADATA_BYTES - 1_000))).status == "0"
    answer = await peer.ask(3, x="a" * MAX_METADATA_BYTES)  # Huffman makes five eighths of it
    assert (answer.status, answer.words) == ("8", f"more than {MAX_METADATA_BYTES} bytes of metadata")
    assert (await peer.ask(5)).status == "0"
    peer.send(f.frame(f.HEADERS, 0, 7, bytes(30_000)), f.frame(f.CONTINUATION, 0, 7, bytes(3_000)))
    told = peer.goaway()
    assert told is not None
    assert told[0] == Code.ENHANCE_YOUR_CALM


def test_streams_given_up_that_are_remembered_are_bounded() -> None:
    streams: Streams[None] = Streams()
    for stream in range(1, 2 * GIVEN_UP_KEPT + 3, 2):
        streams.give_up(stream)
    assert not streams.is_given_up(1)
    assert streams.is_given_up(3)


async def sweeps(peer: Peer, seconds: float) -> None:
    for _ in range(round(seconds / peer.server.limits.sweep_s)):
        peer.connection.look(0.0)
    await peer.settle()


# What is not read ---------------------------------------------------------------------------------


async def test_answers_that_wait_for_a_window_have_a_bound_and_an_end() -> None:
    peer = Peer(max_message_bytes=1_000, stall_s=5.0)
    peer.send(f.settings({f.INITIAL_WINDOW: 0}))
    for stream in (1, 3):
        answer = await peer.ask(stream, b"x" * 1_000)
        assert (answer.head[":status"], answer.body) == ("200", b"")
    # Two answers are more than two messages: no more calls meanwhile.
    assert (await peer.ask(5)).reset == Code.REFUSED_STREAM
    await sweeps(peer, 5.0)
    assert peer.answer(1).reset is None
    peer.send(f.window_update(3, 10))  # this one moves
    await sweeps(peer, 1.0)
    assert peer.answer(1).reset == Code.CANCEL
    moved = peer.answer(3)
    assert (len(moved.body), moved.reset) == (10, None)
    peer.send(f.window_update(3, 1_000))
    assert peer.answer(3).head == {"grpc-status": "0"}
    assert peer.connection.outbox.waiting_bytes == 0
    assert peer.server.calls == 0


async def test_who_does_not_read_is_not_read_and_in_the_end_dropped() -> None:
    peer = Peer(stall_s=5.0)
    peer.send(
        f.settings({f.INITIAL_WINDOW: 2**20}), f.window_update(0, 2**20), peer.request(1, b"x" * 60_000)
    )
    peer.connection.pause_writing()
    peer.unwritten = 200_000
    assert not peer.reading
    await peer.settle()
    assert peer.answer(1).body == b""
    for _ in range(round(15.0 / peer.server.limits.sweep_s)):
        peer.unwritten -= 100  # slowly is not never
        peer.connection.look(0.0)
    assert not peer.aborted
    peer.connection.resume_writing()
    assert peer.reading
    await peer.settle()
    assert len(peer.answer(1).body) == 60_005
    peer.connection.pause_writing()
    await sweeps(peer, 6.0)
    assert peer.aborted


# Who says nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"", f.PREFACE[:9], f.PREFACE, f.PREFACE + f.settings({})[:5]])
async def test_a_handshake_that_does_not_end_does(said: bytes) -> None:
    peer = Peer(shake=False, handshake_s=10.0)
    peer.send(said)
    await sweeps(peer, 10.0)
    assert not peer.aborted
    await sweeps(peer, 1.0)
    assert peer.aborted
    shaken = Peer(handshake_s=10.0)
    await sweeps(shaken, 11.0)
    assert not shaken.aborted


async def test_a_connection_without_calls_is_closed_and_one_with_calls_is_not() -> None:
    peer = Peer(idle_s=20.0, keepalive_s=1_000.0)
    peer.send(peer.request(1, method="Held"))
    await peer.settle()
    await sweeps(peer, 50.0)
    peer.methods.release.set()
    await peer.settle()
    assert peer.answer(1).status == "0"
    await sweeps(peer, 20.0)
    assert not peer.half_closed
    await sweeps(peer, 1.0)
    assert peer.goaway() == (Code.NO_ERROR, "nothing was asked for a while")


async def test_a_request_that_does_not_go_on_ends() -> None:
    peer = Peer(idle_s=20.0, keepalive_s=1_000.0)
    peer.send(peer.opening(1), peer.opening(3))
    await sweeps(peer, 15.0)
    peer.send(f.frame(f.DATA, 0, 3, message(b"hello")[:4]))
    await sweeps(peer, 15.0)
    answer = peer.answer(1)
    assert (answer.status, answer.words, answer.reset) == ("4", "the request did not go on", Code.NO_ERROR)
    peer.send(f.frame(f.DATA, f.END_STREAM, 3, message(b"hello")[4:]))
    await peer.settle()
    assert peer.answer(3).status == "0"


async def test_a_silent_client_is_pinged_and_one_that_is_gone_is_dropped() -> None:
    peer = Peer(keepalive_s=30.0, keepalive_timeout_s=10.0)
    await sweeps(peer, 30.0)
    peer.said(f.PING)
    await sweeps(peer, 5.0)
    ((flags, _, asked),) = peer.said(f.PING)
    assert flags == 0
    peer.send(f.frame(f.PING, f.ACK, 0, asked))
    await sweeps(peer, 30.0)
    assert not peer.aborted
    await sweeps(peer, 9.0)
    assert len(peer.said(f.PING)) == 1
    assert not peer.aborted
    await sweeps(peer, 2.0)
    assert peer.aborted


async def test_a_connection_too_many_is_told_so() -> None:
    first = Peer(max_connections=1)
    second = Peer(server=first.server)
    await second.settle()
    assert second.goaway() == (Code.ENHANCE_YOUR_CALM, "the server has as many connections as it may have")
    assert second.half_closed
    second.lose()
    assert (await first.ask(1)).status == "0"
    first.lose()
    third = Peer(server=first.server)
    assert (await third.ask(1)).status == "0"


async def test_a_connection_that_was_told_goodbye_and_stays_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("inference.http2.connection.LINGER_S", 0.01)
    peer = Peer()
    peer.send(f.frame(f.DATA, 0, 0))
    assert peer.half_closed
    assert not peer.closed
    await eventually_async(lambda: peer.closed)
    peer.lose()


async def test_requests_that_are_not_whole_are_bounded_over_all_connections() -> None:
    first = Peer(max_unfinished_bytes=1_000)
    second = Peer(server=first.server)
    begun = message(bytes(700))[:-1]
    first.send(first.opening(1) + f.frame(f.DATA, 0, 1, begun))
    assert first.server.held == len(begun)
    second.send(second.opening(1) + f.frame(f.DATA, 0, 1, begun))
    refused = second.answer(1)
    assert (refused.status, refused.words) == ("8", "too many bytes are held of requests that are not whole")
    # Who was there before is served, and then there is room again.
    first.send(f.frame(f.DATA, f.END_STREAM, 1, b"\0"))
    assert (await first.ask(3)).status == "0"
    assert first.answer(1).messages == [bytes(700)]
    assert first.server.held == 0
    assert (await second.ask(3)).status == "0"
    second.send(second.opening(5) + f.frame(f.DATA, 0, 5, begun))
    second.lose()
    assert first.server.held == 0
