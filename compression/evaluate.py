"""How good a model is on a log: HR@k, NDCG@k and MRR, beside predictors that learned nothing.

Full catalogue: every known item is ranked by the retrieval head, items the user has seen included
(people come back to them). Fifty candidates: the ranking head orders the item that came next among
items drawn from the user's recent ones, the category at hand and the popular; the draw does not depend
on the model, so figures of two models compare. An item the vocabulary lacks counts as a miss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from compression.dataset import Sequences, Split
from compression.scoring import Scorer
from features.encoding import HistoryArrays, Vocabulary, encode_histories

CANDIDATES: Final = 50
CUTS: Final = (10, 20, 50)
_RECENT: Final = 10
_SAME_CATEGORY: Final = 20
_BATCH: Final = 256
_MISS: Final = 2**31

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Histories = Callable[[Int64], HistoryArrays]


def metrics(ranks: Float64 | Int64, cuts: Sequence[int] = CUTS) -> dict[str, float]:
    """Ranks (1 is best) as HR@k, NDCG@k and MRR, each over all targets."""
    figures: dict[str, float] = {}
    ranks = np.asarray(ranks, np.float64)
    for cut in cuts:
        hit = ranks <= cut
        figures[f"hr@{cut}"] = float(hit.mean()) if len(ranks) else 0.0
        gain = np.where(hit, 1.0 / np.log2(ranks + 1.0), 0.0)
        figures[f"ndcg@{cut}"] = float(gain.mean()) if len(ranks) else 0.0
    figures["mrr"] = float(np.where(ranks < _MISS, 1.0 / ranks, 0.0).mean()) if len(ranks) else 0.0
    return {name: round(value, 5) for name, value in figures.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """Events to be predicted: positions in the sequences, their items' rows (0 where unknown)."""

    positions: Int64
    rows: Int64

    @classmethod
    def draw(
        cls, sequences: Sequences, positions: Int64, vocabulary: Vocabulary, *, limit: int, seed: int
    ) -> Targets:
        """At most `limit` of the positions, drawn with the seed."""
        if len(positions) > limit:
            chosen = np.random.default_rng(seed).choice(len(positions), limit, replace=False)
            positions = positions[np.sort(chosen)]
        items = sequences.items[positions]
        rows = np.where(vocabulary.is_known(items), vocabulary.item_rows_of(items), 0)
        return cls(positions, rows.astype(np.int64))


def histories_before(sequences: Sequences, vocabulary: Vocabulary, max_history: int) -> Histories:
    """What the network is given to predict the events at some positions."""

    def histories(positions: Int64) -> HistoryArrays:
        return encode_histories(sequences.before(positions, max_history), vocabulary, max_history)

    return histories


class Statistics:
    """Counts over the training part: how often each item, and what came after it."""

    def __init__(self, sequences: Sequences, split: Split, vocabulary: Vocabulary) -> None:
        positions = split.train_positions(sequences)
        known = vocabulary.is_known(sequences.items)
        rows = np.where(known, vocabulary.item_rows_of(sequences.items), 0).astype(np.int64)
        self.known_items = len(vocabulary.item_ids)
        self.rows = rows
        self.counts = np.bincount(rows[positions], minlength=self.known_items + 1)[: self.known_items + 1]
        self.counts[0] = 0
        self.popular = 1 + np.argsort(-self.counts[1:], kind="stable")
        self.popular_rank = np.empty(self.known_items + 1, np.float64)
        self.popular_rank[0] = _MISS
        self.popular_rank[1:] = _tied_ranks(self.counts[1:])
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


def evaluate(
    scorer: Scorer,
    sequences: Sequences,
    split: Split,
    vocabulary: Vocabulary,
    *,
    max_history: int,
    limit: int = 5_000,
    seed: int = 7,
    part: str = "test",
) -> dict[str, Any]:
    """The whole report: model and baselines, full catalogue and among fifty."""
    statistics = Statistics(sequences, split, vocabulary)
    positions = split.test if part == "test" else split.validation
    targets = Targets.draw(sequences, positions, vocabulary, limit=limit, seed=seed)
    if not len(targets.positions):
        return {"split": split.name, "part": part, "targets": 0}
    histories = histories_before(sequences, vocabulary, max_history)
    model = full_catalogue(scorer, histories, targets, len(vocabulary.item_ids))
    baselines = baseline_ranks(sequences, targets, statistics)
    asked = draw_candidates(sequences, targets, statistics, vocabulary, seed=seed)
    ranking = among_candidates(scorer, histories, targets, vocabulary, asked)
    simple = baseline_among(sequences, targets, statistics, asked)
    revisits = [
        row in statistics.rows[_history(sequences, position)]
        for position, row in zip(targets.positions.tolist(), targets.rows.tolist(), strict=True)
    ]
    return {
        "split": split.name,
        "part": part,
        "targets": len(targets.positions),
        "catalogue": len(vocabulary.item_ids),
        "unseen_targets": round(float((statistics.counts[targets.rows] == 0).mean()), 5),
        "revisited_targets": round(float(np.mean(revisits)), 5),
        "retrieval": metrics(model),
        "popularity": metrics(baselines["popularity"]),
        "item_to_item": metrics(baselines["item_to_item"]),
        "recent": metrics(baselines["recent"]),
        "ranking_50": metrics(ranking, (1, 5, 10)),
        "popularity_50": metrics(simple["popularity"], (1, 5, 10)),
        "item_to_item_50": metrics(simple["item_to_item"], (1, 5, 10)),
        "recent_50": metrics(simple["recent"], (1, 5, 10)),
    }


def full_catalogue(scorer: Scorer, histories: Histories, targets: Targets, known: int) -> Float64:
    """The rank of each target among all known items, by the retrieval head. Ties count half."""
    table = scorer.item_table()[1 : known + 1]
    ranks = np.empty(len(targets.positions))
    for start in range(0, len(ranks), _BATCH):
        part = slice(start, start + _BATCH)
        scores = scorer.user_vectors(histories(targets.positions[part])) @ table.T
        rows = targets.rows[part]
        own = scores[np.arange(len(rows)), rows - 1][:, None]
        better = (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
        ranks[part] = np.where(rows > 0, 1 + better, _MISS)
    return ranks


def draw_candidates(
    sequences: Sequences, targets: Targets, statistics: Statistics, vocabulary: Vocabulary, *, seed: int
) -> Int64:
    """[targets, 50] item rows; the first is the target, the others differ from it and one another."""
    rng = np.random.default_rng(seed)
    size = min(CANDIDATES, statistics.known_items)
    weights = np.cumsum(statistics.counts[1:] ** 0.75 + 1e-3)
    category_rows = vocabulary.category_rows_of(sequences.categories[np.maximum(targets.positions - 1, 0)])
    drawn = np.empty((len(targets.positions), size), np.int64)
    for at, (position, row) in enumerate(zip(targets.positions.tolist(), targets.rows.tolist(), strict=True)):
        recent = statistics.rows[_history(sequences, position)][::-1][:30].tolist()
        near = statistics.of_category(int(category_rows[at]))
        near = rng.choice(near, min(len(near), _SAME_CATEGORY), replace=False) if len(near) else near
        popular = 1 + np.searchsorted(weights, rng.random(4 * size) * weights[-1])
        chosen = dict.fromkeys([row])
        chosen.update(dict.fromkeys([r for r in dict.fromkeys(recent) if r][:_RECENT]))
        chosen.update(dict.fromkeys([*near.tolist(), *popular.tolist()]))
        if len(chosen) < size:
            filler = rng.permutation(statistics.known_items)[: 2 * size] + 1
            chosen.update(dict.fromkeys(filler.tolist()))
        drawn[at] = list(chosen)[:size]
    return drawn


def among_candidates(
    scorer: Scorer, histories: Histories, targets: Targets, vocabulary: Vocabulary, candidates: Int64
) -> Float64:
    """The rank of each target among its candidates, by the ranking head."""
    of_row = np.concatenate([[0], vocabulary.item_categories])
    ranks = np.empty(len(targets.positions))
    for start in range(0, len(ranks), _BATCH):
        part = slice(start, start + _BATCH)
        asked = candidates[part].astype(np.int32)
        scores = scorer.rank(histories(targets.positions[part]), asked, of_row[asked].astype(np.int32))
        ranks[part] = _ranks_of_first(scores, targets.rows[part])
    return ranks


def baseline_ranks(sequences: Sequences, targets: Targets, statistics: Statistics) -> dict[str, Float64]:
    """Full-catalogue ranks of the simple predictors; each falls back on popularity."""
    item_to_item = np.empty(len(targets.positions))
    recent = np.empty(len(targets.positions))
    for at, (position, row) in enumerate(zip(targets.positions.tolist(), targets.rows.tolist(), strict=True)):
        newest = _newest_first(statistics, sequences, position)
        scores = statistics.followers(newest[:5])
        item_to_item[at] = _listed_rank(row, scores, statistics)
        recent[at] = _listed_rank(row, {r: -i for i, r in enumerate(newest)}, statistics)
    return {
        "popularity": statistics.popular_rank[targets.rows],
        "item_to_item": item_to_item,
        "recent": recent,
    }


def baseline_among(
    sequences: Sequences, targets: Targets, statistics: Statistics, candidates: Int64
) -> dict[str, Float64]:
    """The ranks of the targets among their candidates, by the simple predictors."""
    popularity = statistics.counts[candidates] / (1.0 + statistics.counts.max())
    item_to_item, recent = popularity.copy(), popularity.copy()
    for at, position in enumerate(targets.positions.tolist()):
        newest = _newest_first(statistics, sequences, position)
        follows = statistics.followers(newest[:5])
        age = {row: len(newest) - place for place, row in enumerate(newest)}
        listed = candidates[at].tolist()
        item_to_item[at] += [1e3 * follows.get(row, 0.0) for row in listed]
        recent[at] += [float(age.get(row, 0)) for row in listed]
    return {
        "popularity": _ranks_of_first(popularity, targets.rows),
        "item_to_item": _ranks_of_first(item_to_item, targets.rows),
        "recent": _ranks_of_first(recent, targets.rows),
    }


def _history(sequences: Sequences, position: int) -> slice:
    start = int(sequences.offsets[np.searchsorted(sequences.offsets, position, side="right") - 1])
    return slice(max(start, position - 100), position)


def _newest_first(statistics: Statistics, sequences: Sequences, position: int) -> list[int]:
    """The user's distinct known items, newest first."""
    rows = statistics.rows[_history(sequences, position)][::-1].tolist()
    return [row for row in dict.fromkeys(rows) if row]


def _listed_rank(row: int, scores: dict[int, float], statistics: Statistics) -> float:
    """The rank of an item in a scored list that popularity continues."""
    own = scores.get(row)
    if own is None:
        return float(len(scores) + statistics.popular_rank[row]) if row else float(_MISS)
    others = [score for other, score in scores.items() if other != row]
    return 1 + sum(score > own for score in others) + sum(score == own for score in others) / 2


def _ranks_of_first(scores: npt.NDArray[np.floating[Any]], rows: Int64) -> Float64:
    others, own = scores[:, 1:], scores[:, :1]
    better = (others > own).sum(1) + (others == own).sum(1) / 2
    return np.asarray(np.where(rows > 0, 1.0 + better, _MISS), np.float64)


def _tied_ranks(counts: Int64) -> Float64:
    """Ranks by falling count; equal counts share the middle of their places."""
    ascending = np.sort(counts)
    more = len(counts) - np.searchsorted(ascending, counts, side="right")
    same = np.searchsorted(ascending, counts, side="right") - np.searchsorted(ascending, counts)
    return np.asarray(1 + more + (same - 1) / 2, np.float64)
