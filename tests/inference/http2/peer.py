"""A client by hand, on a transport without a network: what it writes and what it is told, frame by frame."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

from hpack import Decoder, Encoder

from inference.errors import Overloaded
from inference.http2 import frames as f
from inference.http2.connection import Connection
from inference.http2.heads import Deferred, Immediate, Streaming
from inference.http2.limits import Limits
from inference.http2.server import Server

PATH = "/test.Test/"


class Methods:
    """What the server of a test serves. `held` waits for `release`, and counts who gave up."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.begun = 0
        self.given_up = 0
        self.left_s: list[float | None] = []

    def table(self) -> dict[str, Any]:
        return {
            PATH + "Echo": Deferred(self.echo),
            PATH + "Held": Deferred(self.held),
            PATH + "Refuse": Deferred(self.refuse),
            PATH + "Break": Deferred(self.broken),
            PATH + "Cancel": Deferred(self.cancelled),
            PATH + "Now": Immediate(lambda message: message[::-1]),
            PATH + "Chat": Streaming(self.chat),
        }

    async def echo(self, message: bytes, left_s: float | None) -> bytes:
        self.left_s.append(left_s)
        return message

    async def held(self, message: bytes, left_s: float | None) -> bytes:
        self.begun += 1
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        return message

    async def refuse(self, message: bytes, left_s: float | None) -> bytes:
        raise Overloaded(message.decode(), retry_after_s=0.25)

    async def broken(self, message: bytes, left_s: float | None) -> bytes:
        raise ZeroDivisionError("inside")

    async def cancelled(self, message: bytes, left_s: float | None) -> bytes:
        raise asyncio.CancelledError

    @staticmethod
    def chat(message: bytes) -> Iterator[bytes]:
        yield message
        yield message.upper()


@dataclass(frozen=True)
class Answer:
    """What came for a stream."""

    head: dict[str, str]
    body: bytes
    trailers: dict[str, str]
    reset: int | None

    @property
    def messages(self) -> list[bytes]:
        found, at = [], 0
        while at < len(self.body):
            _, length = struct.unpack_from(">BL", self.body, at)
            found.append(self.body[at + 5 : at + 5 + length])
            at += 5 + length
        return found

    @property
    def status(self) -> str | None:
        """gRPC's, wherever it stands."""
        return self.trailers.get("grpc-status", self.head.get("grpc-status"))

    @property
    def words(self) -> str | None:
        return self.trailers.get("grpc-message", self.head.get("grpc-message"))


def message(content: bytes, flag: int = 0) -> bytes:
    return struct.pack(">BL", flag, len(content)) + content


class Peer(asyncio.Transport):
    """The other end of a `Connection`, and its transport."""

    def __init__(self, *, shake: bool = True, server: Server | None = None, **limits: Any) -> None:
        super().__init__()
        self.methods = Methods()
        self.server = server or Server(self.methods.table(), Limits(**limits))
        self.encoder, self.decoder = Encoder(), Decoder()
        self.closed = False
        self.aborted = False
        self.half_closed = False
        self.reading = True
        self.unwritten = 0
        self.frames: list[tuple[int, int, int, bytes]] = []
        self._rest = b""
        self.connection = Connection(self.server, asyncio.get_running_loop())
        self.connection.connection_made(self)
        if shake:
            self.send(f.PREFACE + f.settings({}))

    # What the connection calls ---------------------------------------------------------------------

    def write(self, data: Any) -> None:
        assert not self.half_closed
        data = self._rest + bytes(data)
        at = 0
        while len(data) - at >= 9:
            high, low, kind, flags, stream = f.HEAD.unpack_from(data, at)
            end = at + 9 + (high << 8 | low)
            if end > len(data):
                break
            self.frames.append((kind, flags, stream, data[at + 9 : end]))
            at = end
        self._rest = data[at:]

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.half_closed = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def get_write_buffer_size(self) -> int:
        return self.unwritten

    # What a test calls ------------------------------------------------------------------------------

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.connection.data_received(piece)

    def lose(self) -> None:
        self.connection.connection_lost(None)

    def head(self, method: str = "Echo", **fields: str) -> bytes:
        """A header block."""
        given = {
            ":method": "POST",
            ":scheme": "http",
            ":path": PATH + method,
            ":authority": "test",
            "te": "trailers",
            "content-type": "application/grpc",
        }
        given |= {name.replace("_", "-"): value for name, value in fields.items()}
        return self.encoder.encode(list(given.items()))

    def opening(self, stream: int, method: str = "Echo", flags: int = f.END_HEADERS, **fields: str) -> bytes:
        return f.frame(f.HEADERS, flags, stream, self.head(method, **fields))

    def request(self, stream: int, content: bytes = b"hello", method: str = "Echo", **fields: str) -> bytes:
        return self.opening(stream, method, **fields) + f.frame(
            f.DATA, f.END_STREAM, stream, message(content)
        )

    async def settle(self) -> None:
        """Until what can be done at once is done."""
        for _ in range(8):
            await asyncio.sleep(0)

    async def ask(self, stream: int, *given: Any, **fields: str) -> Answer:
        self.send(self.request(stream, *given, **fields))
        await self.settle()
        return self.answer(stream)

    def answer(self, stream: int) -> Answer:
        """From all frames so far; each is read once."""
        blocks: list[dict[str, str]] = []
        body, reset = b"", None
        for kind, _, of, payload in self._taken(stream):
            if kind == f.HEADERS:
                blocks.append(dict(self.decoder.decode(payload)))  # type: ignore[arg-type]
            elif kind == f.DATA:
                body += payload
            elif kind == f.RST_STREAM:
                reset = int.from_bytes(payload, "big")
            assert of == stream
        return Answer(blocks[0] if blocks else {}, body, blocks[1] if blocks[1:] else {}, reset)

    def said(self, kind: int) -> list[tuple[int, int, bytes]]:
        """Flags, stream and payload of frames of a kind that were not read yet."""
        found = [rest for of, *rest in self.frames if of == kind]
        self.frames = [frame for frame in self.frames if frame[0] != kind]
        return [(flags, stream, payload) for flags, stream, payload in found]

    def goaway(self) -> tuple[int, str] | None:
        """Code and words."""
        for _, _, payload in self.said(f.GOAWAY):
            return int.from_bytes(payload[4:8], "big"), payload[8:].decode()
        return None

    def _taken(self, stream: int) -> list[tuple[int, int, int, bytes]]:
        taken = [frame for frame in self.frames if frame[2] == stream]
        self.frames = [frame for frame in self.frames if frame[2] != stream]
        return taken


def drive(story: Coroutine[Any, Any, None]) -> None:
    """For tests that are no coroutines: hypothesis' are not."""
    asyncio.run(story)
