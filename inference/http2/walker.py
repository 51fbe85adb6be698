"""From the bytes of a connection to its frames, however the bytes are cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from inference.http2 import frames as f
from inference.http2.frames import Code, ConnectionFailed, StreamFailed
from inference.http2.limits import MAX_BLOCK_BYTES, MAX_CONTINUATIONS, MAX_FRAME_BYTES

Take = Callable[[int, int, bytes, int, int], None]
"""Of a frame: flags, stream, and the buffer, within which it goes from here to there."""

_PREFACE_BYTES: Final = len(f.PREFACE)


class Walker:
    """Hands every frame, in order, to the function for its type, and every header block, once it is whole,
    to `opened` with its stream and whether that ends with it. `failed` is told of streams to end; what
    ends the connection is raised."""

    def __init__(
        self,
        take: Mapping[int, Take],
        unknown: Callable[[], None],
        opened: Callable[[int, bool, bytes], None],
        failed: Callable[[int, Code], None],
    ) -> None:
        self._take = {**take, f.HEADERS: self._headers}
        self._unknown = unknown
        self._opened = opened
        self._failed = failed
        self._rest = b""
        self._began = False  # the preface is read
        self._block: tuple[int, bool, bytearray] | None = None  # stream, whether it ends, bytes so far
        self._continuations = 0
        self.settled = False  # the first frame, SETTINGS, is read
        self.stopped = False  # nothing more is read

    def feed(self, data: bytes) -> None:
        """Raises `ConnectionFailed`."""
        if self._rest:
            data = self._rest + data
        self._rest = b""
        at = 0
        if not self._began:
            if not self._begins(data):
                self._rest = data
                return
            at = _PREFACE_BYTES
        size, head, take = len(data), f.HEAD.unpack_from, self._take
        while size - at >= f.HEAD_BYTES and not self.stopped:
            high, low, kind, flags, stream = head(data, at)
            length = high << 8 | low
            if length > MAX_FRAME_BYTES:
                raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "a frame beyond SETTINGS_MAX_FRAME_SIZE")
            start = at + f.HEAD_BYTES
            end = start + length
            if end > size:
                break
            at = end
            stream &= f.LARGEST_STREAM
            if self._block is not None:
                self._continue(kind, flags, stream, data[start:end])
            elif not self.settled and (kind != f.SETTINGS or flags & f.ACK):
                raise ConnectionFailed(Code.PROTOCOL_ERROR, "the first frame is SETTINGS")
            elif kind in take:
                self.settled = True
                try:
                    take[kind](flags, stream, data, start, end)
                except StreamFailed as error:
                    self._failed(stream, error.code)
            else:
                self._unknown()
        if at < size:
            self._rest = data[at:]

    def _begins(self, data: bytes) -> bool:
        """Whether the whole preface is there."""
        if not f.PREFACE.startswith(data[:_PREFACE_BYTES]):
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "not HTTP/2 with prior knowledge")
        self._began = len(data) >= _PREFACE_BYTES
        return self._began

    def _headers(self, flags: int, stream: int, data: bytes, at: int, end: int) -> None:
        if not stream:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "headers of no stream")
        if flags & f.PADDED:
            at, end = f.unpadded(data, at, end)
        if flags & f.PRIORITISED:
            at += 5
            if at > end:
                raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "a priority that is cut")
        if end - at > MAX_BLOCK_BYTES:
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, "too much metadata")
        ended = bool(flags & f.END_STREAM)
        if flags & f.END_HEADERS:
            self._opened(stream, ended, data[at:end])
        else:
            self._block = (stream, ended, bytearray(data[at:end]))
            self._continuations = 0

    def _continue(self, kind: int, flags: int, stream: int, content: bytes) -> None:
        assert self._block is not None
        expected, ended, block = self._block
        if kind != f.CONTINUATION or stream != expected:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "a header block goes on in CONTINUATION")
        block += content
        self._continuations += 1
        if len(block) > MAX_BLOCK_BYTES or self._continuations > MAX_CONTINUATIONS:
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, "a header block without end")
        if flags & f.END_HEADERS:
            self._block = None
            try:
                self._opened(stream, ended, bytes(block))
            except StreamFailed as error:
                self._failed(stream, error.code)
