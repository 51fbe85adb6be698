"""Degraded lists: what a user gets when ranking cannot answer in time.

First the user's own last list (`cached`), else what is popular now (`popular`). Both come from
memory, so they are there when Redis, the engine or both are not, and both are kept as they are
written: under overload most answers are these.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import orjson

from features.statistics import ItemWeights
from stream.replies import Asked, Listed, degraded, items_json


class PopularItems(Protocol):
    """What is popular now; `features.statistics.ItemStatistics` is one."""

    def popular(self) -> ItemWeights: ...


class Fallback:
    """Remembers the last list of recent users, bounded, least recently answered out first."""

    def __init__(self, popular: PopularItems, remembered: int) -> None:
        self._popular = popular
        self._remembered = remembered
        self._last: OrderedDict[int, Listed] = OrderedDict()
        self._weights: ItemWeights | None = None
        self._written: dict[int, Listed] = {}  # of these weights, by k

    def remember(self, asked: Asked, items: bytes, size: int) -> None:
        """Keep a ranked list (`stream.replies.items_json`) for a worse moment."""
        if self._remembered and asked.candidates is None and size:
            self._last[asked.user_id] = degraded(items, size, "cached")
            self._last.move_to_end(asked.user_id)
            if len(self._last) > self._remembered:
                self._last.popitem(last=False)

    def list_for(self, asked: Asked) -> Listed:
        """A degraded list. Excludes hold; given candidates keep their order."""
        if asked.candidates is not None:
            size = len(asked.candidates)
            return _given(asked, asked.candidates, [0.0] * size, ["request"] * size)
        last = self._last.get(asked.user_id)
        if last is not None:
            whole = last.size <= asked.k and not asked.exclude
            return last if whole else _cut(asked, last)
        if asked.exclude:
            return self._popular_for(asked, asked.k + len(asked.exclude))
        if self._popular.popular() is not self._weights:
            self._weights = self._popular.popular()
            self._written = {}
        written = self._written.get(asked.k)
        if written is None:
            self._written[asked.k] = written = self._popular_for(asked, asked.k)
        return written

    def _popular_for(self, asked: Asked, most: int) -> Listed:
        popular = self._popular.popular()
        items, weights = popular.items[:most].tolist(), popular.weights[:most].tolist()
        return _given(asked, items, weights, ["popular"] * len(items))


def _given(asked: Asked, items: Sequence[int], scores: Sequence[float], sources: Sequence[str]) -> Listed:
    """A list that nobody ranked: its k first that are not excluded."""
    kept = [place for place, item in enumerate(items) if item not in asked.exclude][: asked.k]
    written = items_json(
        [items[place] for place in kept],
        [scores[place] for place in kept],
        [sources[place] for place in kept],
        "none",
        "none",
    )
    return degraded(written, len(kept), "popular")


def _cut(asked: Asked, last: Listed) -> Listed:
    """Of the user's last list the k first that are not excluded."""
    made = orjson.loads(b"{%b}" % last.body)
    lines = [line for line in made["items"] if line["item_id"] not in asked.exclude][: asked.k]
    written = items_json(
        [line["item_id"] for line in lines],
        [line["score"] for line in lines],
        [line["source"] for line in lines],
        made["model_version"],
        made["engine"],
    )
    return degraded(written, len(lines), "cached")
