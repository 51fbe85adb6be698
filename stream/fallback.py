"""Degraded lists: what a user gets when ranking cannot answer in time.

First the user's own last list (`cached`), else what is popular now (`popular`). Both come from
memory, so they are there when Redis, the engine or both are not.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from features.statistics import ItemWeights
from stream.replies import Answer


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
        if answer.candidates is not None:
            size = len(answer.candidates)
            return answer.given("popular", answer.candidates, [0.0] * size, ["request"] * size)
        last = self._last.get(answer.user_id)
        if last is not None and last.items:
            return answer.given(
                "cached",
                last.items,
                last.scores,
                last.sources,
                model_version=last.model_version,
                engine=last.engine,
            )
        popular, most = self._popular.popular(), answer.k + len(answer.exclude)
        items, weights = popular.items[:most].tolist(), popular.weights[:most].tolist()
        return answer.given("popular", items, weights, ["popular"] * len(items))
