"""Requests: lists for users who have not clicked just now."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from stream.recommend import RequestPath


def agent(path: RequestPath) -> Callable[[Any], Awaitable[None]]:
    async def requests(units: Any) -> None:
        async for unit in units:
            await path.requests(unit)

    return requests
