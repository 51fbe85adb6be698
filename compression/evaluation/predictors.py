"""Predictors that learned nothing, each a function from positions in a log to scores of all known items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from compression.evaluation.transitions import TransitionCounts, TransitionSettings
from compression.logs.dataset import Sequences, Split
from features.encoding import Vocabulary

# Transition counts are held whole: of longer logs they would not fit a small machine.
MOST_COUNTED: Final = 5_000_000
FUSION_WEIGHTS: Final = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)
_RECENT_EVENTS: Final = 100

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Scores = Callable[[Int64], Float32]
"""Positions [B] to the scores [B, known items] of what may stand there."""


class Statistics:
    """Counts over the training part: how often each item, and what came after it."""

    def __init__(self, sequences: Sequences, split: Split, vocabulary: Vocabulary) -> None:
        self.sequences = sequences
        self.trained = positions = split.train_positions(sequences)
        known = vocabulary.is_known(sequences.items)
        rows = np.where(known, vocabulary.item_rows_of(sequences.items), 0).astype(np.int64)
        self.known_items = len(vocabulary.item_ids)
        self.rows = rows
        self.counts = np.bincount(rows[positions], minlength=self.known_items + 1)[: self.known_items + 1]
        self.counts[0] = 0
        self._popularity = (self.counts[1:] / (1.0 + self.counts.max())).astype(np.float32)
        pairs = positions[:-1][np.diff(positions) == 1]
        pairs = pairs[np.diff(sequences.user_of(np.stack([pairs, pairs + 1])), axis=0)[0] == 0]
        pairs = pairs[(rows[pairs] > 0) & (rows[pairs + 1] > 0)]
        keys, times = np.unique(rows[pairs] * (self.known_items + 1) + rows[pairs + 1], return_counts=True)
        self._from = keys // (self.known_items + 1)
        self._to = keys % (self.known_items + 1)
        self._times = times
        by_category = np.argsort(vocabulary.item_categories, kind="stable")
        self._by_category = by_category + 1
        self._category_starts = np.searchsorted(
            vocabulary.item_categories[by_category], np.arange(vocabulary.category_rows + 1)
        )

    def followers(self, recent: Sequence[int]) -> dict[int, float]:
        """Items that came after the recent ones (newest first), older ones counting less."""
        scores: dict[int, float] = {}
        for age, row in enumerate(recent):
            start, end = np.searchsorted(self._from, [row, row + 1])
            times = self._times[start:end]
            share = 0.7**age * times / max(1, times.sum())
            for item, score in zip(self._to[start:end].tolist(), share.tolist(), strict=True):
                scores[item] = scores.get(item, 0.0) + score
        return scores

    def of_category(self, row: int) -> Int64:
        return self._by_category[self._category_starts[row] : self._category_starts[row + 1]]

    def seen(self, position: int) -> Int64:
        """The rows of known items that the user had before, each once."""
        rows = np.unique(self.rows[self._start(position) : position])
        return rows[rows > 0]

    def recent(self, position: int) -> Int64:
        """What of the user's past the simple predictors look at."""
        return self.history(position, _RECENT_EVENTS)

    def newest_first(self, position: int) -> list[int]:
        """The user's distinct known items, newest first."""
        return [row for row in dict.fromkeys(self.recent(position)[::-1].tolist()) if row]

    def history(self, position: int, length: int) -> Int64:
        """The rows of the user's last `length` events before, oldest first, 0 where unknown."""
        return self.rows[max(self._start(position), position - length) : position]

    def popularity_scores(self, positions: Int64) -> Float32:
        return np.tile(self._popularity, (len(positions), 1))

    def item_to_item_scores(self, positions: Int64) -> Float32:
        """What followed the user's last items, then the popular."""
        return self._listed(positions, lambda newest: self.followers(newest[:5]))

    def recent_scores(self, positions: Int64) -> Float32:
        """The user's own items, newest first, then the popular."""
        return self._listed(positions, lambda newest: {row: 1 / (1 + i) for i, row in enumerate(newest)})

    def _listed(self, positions: Int64, listed: Callable[[list[int]], dict[int, float]]) -> Float32:
        scores = self.popularity_scores(positions)
        for at, position in enumerate(positions.tolist()):
            found = listed(self.newest_first(position))
            # Popularity is below 1, so it only orders what is not listed.
            scores[at, np.fromiter(found, np.int64, len(found)) - 1] = [1 + one for one in found.values()]
        return scores

    def _start(self, position: int) -> int:
        return int(self.sequences.offsets[self.sequences.user_of(np.asarray(position, np.int64))])


class Transitions:
    """Transition counts of the training part as a predictor."""

    def __init__(self, statistics: Statistics, settings: TransitionSettings) -> None:
        self._statistics = statistics
        positions = statistics.trained
        self._length = settings.max_history
        self._counts = TransitionCounts(
            statistics.rows[positions],
            statistics.sequences.user_of(positions),
            statistics.known_items,
            settings,
        )

    def scores(self, positions: Int64) -> Float32:
        histories = [self._statistics.history(at, self._length) for at in positions.tolist()]
        return self._counts.scores(histories, self._statistics.sequences.user_of(positions))


def fused(model: Scores, counts: Scores, weight: float) -> Scores:
    """log P(item) by the model, plus `weight` times the score of the counts."""

    def scores(positions: Int64) -> Float32:
        return log_chances(model(positions)) + np.float32(weight) * counts(positions)

    return scores


def remembered(scores: Scores) -> Scores:
    """The same, worked out once where it is asked for the same array of positions again and again; what
    it returns may be written to."""
    kept: tuple[Int64, Float32] | None = None

    def once(positions: Int64) -> Float32:
        nonlocal kept
        if kept is None or kept[0] is not positions:
            kept = positions, scores(positions)
        return kept[1].copy()

    return once


def log_chances(logits: Float32) -> Float32:
    """log P(item) [B, known] of scores that are written to."""
    logits -= logits.max(1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    return logits
