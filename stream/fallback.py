"""Degraded lists: what a user gets when ranking cannot answer in time.

First the user's own last list (`cached`), else what is popular now (`popular`). Both come from
memory, so they are there when Redis, the engine or both are not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

from features.statistics import ItemWeights
from stream.replies import Answer
from topics.messages import Degradation


class PopularItems(Protocol):
    """What is popular now; `features.statistics.ItemStatistics` is one."""

    def popular(self) -> ItemWeights: ...


class Fallback:
    """Remembers the last list of recent users, bounded, least recently answered out first."""

    def __init__(self, popular: PopularItems, remembered: int) -> None:
        self._popular = popular
        self._remembered = remembered
        self._last: OrderedDict[int, Answer] = OrderedDict()

    def remember(self, answer: Answer) -> None:
        """Keep a ranked list for a worse moment."""
        if self._remembered and answer.candidates is None:
            self._last[answer.user_id] = answer
            self._last.move_to_end(answer.user_id)
            if len(self._last) > self._remembered:
                self._last.popitem(last=False)

    def answer(self, answer: Answer) -> Answer:
        """The answer with a degraded list in it. Excludes hold; given candidates keep their order."""
        last = self._last.get(answer.user_id)
        degraded: Degradation = "popular"
        rows: Iterable[tuple[int, float, str]]
        if answer.candidates is not None:
            rows = ((item, 0.0, "request") for item in answer.candidates)
        elif last is not None and last.items:
            degraded = "cached"
            answer = replace(answer, model_version=last.model_version, engine=last.engine)
            rows = zip(last.items, last.scores, last.sources, strict=True)
        else:
            popular, most = self._popular.popular(), answer.k + len(answer.exclude)
            pairs = zip(popular.items[:most].tolist(), popular.weights[:most].tolist(), strict=True)
            rows = ((item, weight, "popular") for item, weight in pairs)
        kept = [row for row in rows if row[0] not in answer.exclude][: answer.k]
        return replace(
            answer,
            items=[item for item, _, _ in kept],
            scores=[score for _, score, _ in kept],
            sources=[source for _, _, source in kept],
            degraded=degraded,
        )
