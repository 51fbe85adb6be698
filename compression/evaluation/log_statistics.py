"""What `features.statistics.ItemStatistics` would know at the end of a log's training part.

The same sums, shares, bounds and half-lives, counted at once. `find_candidates` takes it as it takes the
worker's, so that what is chosen here is chosen on lists as they are served.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from compression.logs.dataset import Sequences
from features.settings import FeatureSettings
from features.statistics import NOTHING, TRANSITION_PRIOR, ItemWeights

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


class LogStatistics:
    """Of the events at some positions, ascending."""

    def __init__(self, sequences: Sequences, positions: Int64, settings: FeatureSettings) -> None:
        items, categories = sequences.items[positions], sequences.categories[positions]
        stamps = sequences.timestamps[positions].astype(np.float64)
        ago_s = stamps - stamps.max(initial=0.0)
        weights = np.array(settings.behavior_weights)[sequences.behaviors[positions]]
        popularity = weights * np.exp2(ago_s / settings.popularity_half_life_s)
        transition = weights * np.exp2(ago_s / settings.transition_half_life_s)
        user = sequences.user_of(positions)
        follows = np.flatnonzero((user[1:] == user[:-1]) & (items[1:] != items[:-1])) + 1
        self._after = _Lists(
            items[follows - 1], items[follows], transition[follows], settings.transition_limit
        )
        self._within = _Lists(categories, items, popularity, settings.category_limit)
        (self._popular,) = _Lists(
            np.zeros(len(items), np.int64), items, popularity, settings.popular_limit
        ).relative([0])

    def transitions(self, items: Sequence[int]) -> list[ItemWeights]:
        return self._after.shares(items)

    def categories(self, categories: Sequence[int]) -> list[ItemWeights]:
        return self._within.relative(categories)

    def popular(self) -> ItemWeights:
        return self._popular


class _Lists:
    """The heaviest members of each list, by the list's id."""

    def __init__(self, ids: Int64, items: Int64, weights: Float64, limit: int) -> None:
        names, number = np.unique(items, return_inverse=True)
        self._ids, list_ = np.unique(ids, return_inverse=True)
        pairs, pair = np.unique(list_ * max(1, len(names)) + number, return_inverse=True)
        sums = np.bincount(pair, weights=weights, minlength=len(pairs))
        list_ = pairs // max(1, len(names))
        heaviest = np.lexsort((-sums, list_))
        list_ = list_[heaviest]
        starts = np.searchsorted(list_, np.arange(len(self._ids) + 1))
        kept = np.arange(len(list_)) - starts[list_] < limit
        self._items = names[pairs[heaviest] % max(1, len(names))][kept]
        self._weights = sums[heaviest][kept]
        self._starts = np.searchsorted(list_[kept], np.arange(len(self._ids) + 1))

    def shares(self, ids: Sequence[int]) -> list[ItemWeights]:
        return [
            ItemWeights(items, (weights / (weights.sum() + TRANSITION_PRIOR)).astype(np.float32))
            if len(items)
            else NOTHING
            for items, weights in map(self._read, ids)
        ]

    def relative(self, ids: Sequence[int]) -> list[ItemWeights]:
        return [
            ItemWeights(items, (weights / weights[0]).astype(np.float32)) if len(items) else NOTHING
            for items, weights in map(self._read, ids)
        ]

    def _read(self, id_: int) -> tuple[Int64, Float64]:
        at = int(np.searchsorted(self._ids, id_))
        if at == len(self._ids) or self._ids[at] != id_:
            return self._items[:0], self._weights[:0]
        part = slice(self._starts[at], self._starts[at + 1])
        return self._items[part], self._weights[part]
