"""Where targets rank among fifty candidates, which no model has a say in."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from compression.evaluation.predictors import Statistics
from compression.evaluation.scoring import Scorer, row_categories
from compression.evaluation.targets import MISS, Float64, Histories, Int64, Targets
from compression.logs.dataset import Sequences
from features.encoding import Vocabulary

CANDIDATES: Final = 50
_RECENT: Final = 10
_SAME_CATEGORY: Final = 20
_BATCH: Final = 256


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
        recent = statistics.recent(position)[::-1][:30].tolist()
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
    of_row = row_categories(vocabulary)
    ranks = np.empty(len(targets.positions))
    for start in range(0, len(ranks), _BATCH):
        part = slice(start, start + _BATCH)
        asked = candidates[part].astype(np.int32)
        scores = scorer.rank(histories(targets.positions[part]), asked, of_row[asked])
        ranks[part] = _ranks_of_first(scores, targets.rows[part])
    return ranks


def baseline_among(
    sequences: Sequences, targets: Targets, statistics: Statistics, candidates: Int64
) -> dict[str, Float64]:
    """The ranks of the targets among their candidates, by the simple predictors."""
    popularity = statistics.counts[candidates] / (1.0 + statistics.counts.max())
    item_to_item, recent = popularity.copy(), popularity.copy()
    for at, position in enumerate(targets.positions.tolist()):
        newest = statistics.newest_first(position)
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


def _ranks_of_first(scores: npt.NDArray[np.floating[Any]], rows: Int64) -> Float64:
    others, own = scores[:, 1:], scores[:, :1]
    better = (others > own).sum(1) + (others == own).sum(1) / 2
    return np.asarray(np.where(rows > 0, 1.0 + better, MISS), np.float64)
