"""Units of clicks or of requests: taken in arrival order, answered while the next one is taken."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from stream.work import Unit


def agent(take: Callable[[Unit], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    async def units(waiting: Any) -> None:
        async for unit in waiting:
            await take(unit)

    return units
