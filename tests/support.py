"""What several tests need and no fixture has to own."""

from __future__ import annotations

import asyncio
import inspect
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

POLL_S = 0.02


def eventually(predicate: Callable[[], T], timeout_s: float = 10.0, *, what: str = "") -> T:
    """The first truthy answer of `predicate`; AssertionError with the last one past the deadline."""
    deadline_s = time.monotonic() + timeout_s
    while not (answer := predicate()):
        assert time.monotonic() < deadline_s, f"{what or predicate} still {answer!r} after {timeout_s} s"
        time.sleep(POLL_S)
    return answer


async def eventually_async(predicate: Callable[[], Any], timeout_s: float = 10.0, *, what: str = "") -> Any:
    """`eventually` for predicates that await, or that wait for what the running loop does."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        answer = predicate()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer:
            return answer
        assert time.monotonic() < deadline_s, f"{what or predicate} still {answer!r} after {timeout_s} s"
        await asyncio.sleep(POLL_S)


def unique(name: str) -> str:
    """A topic, group or key name that no other test has: `clicks-3f9a1c02`."""
    return f"{name}-{uuid.uuid4().hex[:8]}"
