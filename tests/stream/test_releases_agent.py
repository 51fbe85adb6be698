"""What is announced on model-releases: taken where it can be read, passed over where it cannot."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from stream.agents import releases
from topics.codec import encode
from topics.messages import ModelReleased

RELEASE = ModelReleased(version="v2", uri="file:///v2", sha256="0" * 64, stage="serving")


class Event(NamedTuple):
    """The part of a Faust event that the agent reads."""

    key: bytes | None
    value: bytes | None
    headers: dict[str, bytes | None]


class Announcements:
    """A stream of so many events."""

    def __init__(self, *events: Event) -> None:
        self._events = events

    async def events(self) -> AsyncIterator[Event]:
        for event in self._events:
            yield event


class Loader:
    def __init__(self) -> None:
        self.told: list[Any] = []

    async def load_model(self, announced: str | None = None, sha256: str | None = None) -> None:
        self.told.append((announced, sha256))


async def told(*events: Event) -> list[Any]:
    loader = Loader()
    await releases.agent(loader, "serving")(Announcements(*events))
    return loader.told


async def test_what_cannot_be_read_is_passed_over_and_the_next_is_taken():
    value, headers = encode(RELEASE)
    good = Event(b"serving", value, dict(headers))
    bad = [
        good._replace(value=None),
        good._replace(value=b"\xff"),
        good._replace(value=b"{}"),
        good._replace(value=b"x" * 100_000),
        good._replace(key=None),
        good._replace(key=b"canary-of-others"),
    ]
    assert await told(*bad, good) == [("v2", "0" * 64)]


async def test_a_schema_version_that_is_not_known_is_not_read():
    value, headers = encode(RELEASE)
    newer = Event(b"serving", value, {**dict(headers), "tailrace-schema": b"2"})
    assert await told(newer) == []
    assert await told(newer._replace(headers={})) == [("v2", "0" * 64)]
