"""Releases: whatever changes stage, the worker looks at what its alias says by now."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from topics.codec import DecodeError, decode_release

log = logging.getLogger(__name__)


class Loader(Protocol):
    async def load_model(self, announced: str | None = None, sha256: str | None = None) -> None: ...


def agent(loader: Loader, alias: str) -> Callable[[Any], Awaitable[None]]:
    """Takes what is announced under `alias`, the record's key; other aliases are other workers' matter."""

    async def releases(announcements: Any) -> None:
        async for event in announcements.events():
            if event.key != alias.encode():
                continue
            try:
                release = decode_release(event.value, event.headers.items())
            except DecodeError as error:
                log.warning("A release announcement cannot be read: %s", error)
                continue
            await loader.load_model(release.version, release.sha256)

    return releases
