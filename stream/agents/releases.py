"""Releases: a version that begins to serve is loaded beside the one before it, then switched to."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from topics.codec import DecodeError, decode_release

log = logging.getLogger(__name__)


class Loader(Protocol):
    async def load_model(self, wanted: str | None = None) -> None: ...


def agent(loader: Loader) -> Callable[[Any], Awaitable[None]]:
    async def releases(values: Any) -> None:
        async for value in values:
            try:
                release = decode_release(value)
            except DecodeError as error:
                log.warning("A release announcement cannot be read: %s", error)
                continue
            if release.stage == "serving":
                await loader.load_model(release.version)

    return releases
