"""How good the lists were that users had when they clicked, computed from the stream itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from infra.clients import everything_since, reader
from topics.messages import BehaviorEvent


@dataclass(frozen=True, slots=True)
class OnlineHits:
    """Of `asked` clicks of users who had a list before, `hits` were on an item of that list."""

    asked: int
    hits: int

    @property
    def rate(self) -> float:
        return self.hits / self.asked if self.asked else 0.0


def online_hits(
    clicks: Iterable[tuple[str, BehaviorEvent]], lists: Mapping[str, Sequence[int]], k: int
) -> OnlineHits:
    """HR@k: is the next click of a user among the first k items of the list that answered the click
    before? `clicks` by id in the order they were sent, `lists` by the click they answer. A list is made
    of what came before the click that it is judged by, so nothing is known too early."""
    asked = hits = 0
    shown: dict[int, Sequence[int]] = {}
    for event_id, click in clicks:
        before = shown.get(click.user_id)
        if before is not None:
            asked += 1
            hits += click.item_id in before[:k]
        if event_id in lists:
            shown[click.user_id] = lists[event_id]
    return OnlineHits(asked, hits)


def lists_since(bootstrap: str, topic: str, offsets: Mapping[Any, int]) -> dict[str, list[int]]:
    """Click id to the items of the latest list that answers it, of the lists from `offsets` on."""
    consumer = reader(bootstrap, topic)
    found: dict[str, list[int]] = {}
    try:
        for record in everything_since(consumer, offsets):
            body = orjson.loads(record.value)
            items = [item["item_id"] for item in body["items"]]
            found.update((click["event_id"], items) for click in body["trigger"]["clicks"])
    finally:
        consumer.close()
    return found
