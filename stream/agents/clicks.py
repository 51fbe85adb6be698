"""Clicks: appended in arrival order, answered while the next unit is appended."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from stream.recommend import RequestPath


def agent(path: RequestPath) -> Callable[[Any], Awaitable[None]]:
    async def clicks(units: Any) -> None:
        async for unit in units:
            await path.clicks(unit)

    return clicks
