"""Every bound of a connection, with its number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# One frame is held until it is whole.
MAX_FRAME_BYTES: Final = 64 * 1024
# What a client may send ahead of being told that it was taken.
STREAM_WINDOW: Final = 2**20
CONNECTION_WINDOW: Final = 4 * 2**20
# A header block: as it comes, and how many CONTINUATION frames it may come in.
MAX_BLOCK_BYTES: Final = 32 * 1024
MAX_CONTINUATIONS: Final = 16
# Decoded (RFC 9113, 6.5.2). What is beyond the first is RESOURCE_EXHAUSTED, beyond the second a GOAWAY.
MAX_METADATA_BYTES: Final = 16 * 1024
MOST_METADATA_BYTES: Final = 64 * 1024
# Header blocks remembered per connection.
BLOCKS_KEPT: Final = 64
# Entries of one SETTINGS frame.
MAX_SETTINGS: Final = 64
# Frames in a row that neither ask nor bring anything, while nothing is answered either.
MAX_IDLE_FRAMES: Final = 1_000
# Calls given up by RST_STREAM, per connection: so many at once, and so many more each second.
RESETS_AT_ONCE: Final = 1_000
RESETS_PER_S: Final = 1_000.0
# Pings that come too soon before the client is sent away. Without calls a ping every two hours is enough.
MAX_PING_STRIKES: Final = 2
IDLE_PING_INTERVAL_S: Final = 7_200.0
# Answers of a streaming call that wait for their client's window.
MAX_UNSENT_BYTES: Final = 128 * 1024
# Streams that ended before their client was done sending: what still comes for them is dropped unread.
GIVEN_UP_KEPT: Final = 1_024
# Longer sentences about a failure are cut.
MAX_STATUS_CHARACTERS: Final = 1_000
# A connection that is closed has so long to read why.
LINGER_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What differs between servers."""

    max_message_bytes: int = 64 * 2**20
    max_unfinished_bytes: int = 512 * 2**20  # of requests that are not whole, all connections
    max_calls: int = 1088  # of all connections
    max_connections: int = 1024
    max_streams: int = 256  # of one connection
    handshake_s: float = 10.0  # until a client's first SETTINGS
    idle_s: float = 75.0  # without a call; also for a request that does not go on
    keepalive_s: float = 60.0  # of silence before a ping
    keepalive_timeout_s: float = 10.0  # without an answer to it
    stall_s: float = 20.0  # for an answer, or a socket, that its client does not read
    min_ping_interval_s: float = 10.0

    @property
    def max_held_bytes(self) -> int:
        """Of one connection: of requests that are not whole yet, and likewise of answers that wait for
        their client's window."""
        return 2 * self.max_message_bytes

    @property
    def sweep_s(self) -> float:
        """How often connections are looked at."""
        shortest = min(
            self.handshake_s, self.idle_s, self.keepalive_s, self.keepalive_timeout_s, self.stall_s
        )
        return min(1.0, max(0.01, shortest / 4))
