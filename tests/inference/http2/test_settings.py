"""SETTINGS of a client: a frame that says much costs the server little."""

from __future__ import annotations

from typing import Any

from inference.http2 import frames as f
from inference.http2.frames import Code
from inference.http2.limits import MAX_SETTINGS
from tests.inference.http2.peer import Peer

DEFAULT = 65_535


class Watched(dict[int, Any]):
    """Open streams that count how often all of them are looked at."""

    looks = 0

    def values(self) -> Any:
        self.looks += 1
        return super().values()


def windows(*values: int) -> bytes:
    """One frame that says each of them."""
    return f.frame(f.SETTINGS, 0, 0, b"".join(f.SETTING.pack(f.INITIAL_WINDOW, value) for value in values))


async def test_a_frame_of_many_windows_looks_at_the_streams_once() -> None:
    peer = Peer()
    peer.send(*(peer.opening(2 * call + 1, "Held") for call in range(50)))
    watched = peer.connection._streams.open = Watched(peer.connection._streams.open)
    peer.send(windows(*(DEFAULT + number for number in range(MAX_SETTINGS))))
    assert watched.looks == 1
    assert peer.connection.outbox.stream_window == DEFAULT + MAX_SETTINGS - 1
    assert not peer.half_closed


async def test_a_window_beyond_the_largest_ends_the_connection_wherever_it_stands_in_a_frame() -> None:
    for values in ((f.LARGEST_WINDOW + 1, DEFAULT), (DEFAULT, f.LARGEST_WINDOW + 1)):
        peer = Peer()
        peer.send(windows(*values))
        assert peer.goaway() == (Code.FLOW_CONTROL_ERROR, "a window beyond 2^31 - 1")


async def test_a_window_that_would_carry_an_open_stream_beyond_the_largest_ends_the_connection() -> None:
    peer = Peer()
    peer.send(peer.opening(1, "Held"), f.window_update(1, 10))
    peer.send(windows(f.LARGEST_WINDOW - 10))
    assert not peer.half_closed
    peer.send(windows(f.LARGEST_WINDOW - 9))
    assert peer.goaway() == (Code.FLOW_CONTROL_ERROR, "a window beyond 2^31 - 1")
