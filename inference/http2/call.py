"""One stream: a call, from its headers to its status."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Any, Final, Protocol

from inference.errors import InferenceError
from inference.http2.heads import Deferred, Head, Immediate, Streaming
from inference.http2.limits import MAX_UNSENT_BYTES, Limits
from inference.http2.messages import PREFIX, PREFIX_BYTES, Refused, inflated, length_at
from inference.http2.sending import Outbox, Sending
from inference.http2.status import PUSHBACK, Failure, Status

log = logging.getLogger(__name__)

_LATE: Final = Failure(Status.DEADLINE_EXCEEDED, "the deadline passed")
_FAILED: Final = Failure(Status.INTERNAL, "the server failed; its log says how")
_CANCELLED: Final = Failure(Status.CANCELLED, "the server gave the call up")
_ONE: Final = Failure(Status.INTERNAL, "the method takes one message")
_UNREAD: Final = Failure(Status.RESOURCE_EXHAUSTED, "the answers are not read")
_NOT_WHOLE: Final = Failure(Status.INTERNAL, "the last message is not whole")


class Line(Protocol):
    """What a call needs of its connection."""

    loop: asyncio.AbstractEventLoop
    limits: Limits
    outbox: Outbox

    def hold(self, more: int) -> bool:
        """Note bytes of requests that are not whole; False where they are too many."""


class Call(Sending):
    """Told of what its client sends; answers through the outbox, once."""

    __slots__ = ("body", "deadline_s", "ended", "head", "line", "task", "unread")

    def __init__(self, line: Line, stream: int, head: Head) -> None:
        super().__init__(stream)
        self.line = line
        self.head = head
        timeout_s = head.timeout_s
        self.deadline_s = None if timeout_s is None else line.loop.time() + timeout_s
        self.ended = False  # the client has sent all it will
        self.unread = 0  # bytes taken that the client was not told of
        self.body: bytearray | None = None  # of messages that are not whole
        self.task: asyncio.Task[None] | None = None

    def received(self, data: bytes, at: int, end: int, ended: bool) -> None:
        """data[at:end] of the stream's bytes; `ended` with the last."""
        self.ended = ended
        if self.over:
            return
        if (
            ended
            and self.body is None
            and type(self.head.method) is not Streaming
            and end - at >= PREFIX_BYTES
        ):
            # The usual call: a message that is whole.
            flag, length = PREFIX.unpack_from(data, at)
            if not flag and length == end - at - PREFIX_BYTES <= self.line.limits.max_message_bytes:
                self._begin(data[at + PREFIX_BYTES : end])
                return
        self.quiet = 0
        if self.body is None:
            self.body = bytearray()
        self.body += memoryview(data)[at:end]
        if not self.line.hold(end - at):
            self.fail(
                Failure(Status.RESOURCE_EXHAUSTED, "too many bytes are held of requests that are not whole")
            )
            return
        try:
            self._read(self.body)
        except Refused as error:
            self.fail(error.failure)

    def fail(self, failure: Failure) -> None:
        """End the call with a status; what serves it is given up."""
        if self.over:
            return
        self._give_up()
        self.line.outbox.trailers(self, failure.block())

    def reset(self) -> None:
        """Nobody waits for an answer any more."""
        self.over = True
        self._give_up()

    def look(self, now_s: float) -> bool:
        """Once a sweep. False where the client does not take its answer."""
        limits = self.line.limits
        if not self.line.outbox.paused:
            self.quiet += 1
        quiet_s = self.quiet * limits.sweep_s
        if self.unsent:
            return quiet_s <= limits.stall_s
        if self.deadline_s is not None and now_s > self.deadline_s:
            self.fail(_LATE)
        elif not self.ended and quiet_s > limits.idle_s:
            self.fail(Failure(Status.DEADLINE_EXCEEDED, "the request did not go on"))
        return True

    def _read(self, body: bytearray) -> None:
        """Serve what is whole of the body."""
        most = self.line.limits.max_message_bytes
        streaming = type(self.head.method) is Streaming
        at = 0
        while len(body) - at >= PREFIX_BYTES:
            compressed, length = length_at(body, at, most)
            end = at + PREFIX_BYTES + length
            if not streaming and len(body) > end:
                raise Refused(_ONE)
            if len(body) < end or not (streaming or self.ended):
                break
            content = bytes(memoryview(body)[at + PREFIX_BYTES : end])
            if compressed:
                content = inflated(content, self.head.encoding, most)
            at = end
            self._begin(content)
            if self.over or not streaming:
                break
        if self.over:
            return
        self._take(body, at)
        if self.ended and not (self.task or self.over):
            if len(body) or not streaming:
                raise Refused(_NOT_WHOLE if len(body) else _ONE)
            self.line.outbox.complete(self)

    def _take(self, body: bytearray, count: int) -> None:
        if count:
            del body[:count]
            self.line.hold(-count)

    def _begin(self, message: bytes) -> None:
        method = self.head.method
        if type(method) is Deferred:
            self.task = self.line.loop.create_task(self._serve(method, message))
            return
        try:
            if type(method) is Immediate:
                self.line.outbox.answer(self, method.serve(message))
            elif type(method) is Streaming:
                for answer in method.serve(message):
                    self.line.outbox.message(self, answer)
                if len(self.unsent) > MAX_UNSENT_BYTES:
                    self.fail(_UNREAD)
        except Exception as error:  # noqa: BLE001
            self.fail(failure_of(error))

    async def _serve(self, method: Deferred, message: bytes) -> None:
        left_s = None if self.deadline_s is None else self.deadline_s - self.line.loop.time()
        try:
            answer = await method.serve(message, left_s)
        except asyncio.CancelledError:
            # Not by us: then nobody waits.
            self.task = None
            self.fail(_CANCELLED)
            raise
        except Exception as error:  # noqa: BLE001
            self.task = None
            self.fail(failure_of(error))
            return
        self.task = None
        if not self.over:
            self.line.outbox.answer(self, answer)

    def _give_up(self) -> None:
        if self.task is not None:
            self.task.cancel()
            self.task = None


def failure_of(error: Exception) -> Failure:
    if not isinstance(error, InferenceError):
        log.error("a call failed", exc_info=error)
        return _FAILED
    after_s = error.retry_after_s
    metadata: Any = () if after_s is None else ((PUSHBACK, str(math.ceil(1e3 * after_s))),)
    return Failure(Status[error.grpc_status], str(error), metadata)
