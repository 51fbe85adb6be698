"""Where targets rank among all known items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np

from compression.evaluation.predictors import Float32, Scores
from compression.evaluation.scoring import Scorer
from compression.evaluation.targets import MISS, Float64, Histories, Int64, Targets

_BATCH: Final = 256
_CELLS: Final = 25_000_000  # scores held at once


def retrieval_scores(scorer: Scorer, histories: Histories, known: int) -> Scores:
    """By the retrieval head: user vectors against the item table."""
    table = scorer.item_table()[1 : known + 1].T

    def scores(positions: Int64) -> Float32:
        return np.asarray(scorer.user_vectors(histories(positions)) @ table, np.float32)

    return scores


def full_catalogue(scorer: Scorer, histories: Histories, targets: Targets, known: int) -> Float64:
    """The rank of each target among all known items, by the retrieval head."""
    return catalogue_ranks(retrieval_scores(scorer, histories, known), targets, known)


def catalogue_ranks(
    scores: Scores, targets: Targets, known: int, seen: Callable[[int], Int64] | None = None
) -> Float64:
    """The rank of each target among all `known` items but those its user has `seen`; one that was seen
    is a miss. Ties count half."""
    return ranks_by({"": scores}, targets, known, seen)[""]


def ranks_by(
    predictors: Mapping[str, Scores],
    targets: Targets,
    known: int,
    seen: Callable[[int], Int64] | None = None,
) -> dict[str, Float64]:
    """As above, by each of several predictors, which are asked for the same positions in turn."""
    ranks = {name: np.empty(len(targets.positions)) for name in predictors}
    for part in parts(len(targets.positions), known):
        some = Targets(targets.positions[part], targets.rows[part])
        for name, scores in predictors.items():
            ranks[name][part] = ranks_of(scores(some.positions), some, seen)
    return ranks


def ranks_of(scores: Float32, targets: Targets, seen: Callable[[int], Int64] | None) -> Float64:
    """Of targets whose `scores` [B, known] are given, and are written to."""
    at = np.arange(len(targets.rows))
    if seen is not None:
        before = [seen(position) for position in targets.positions.tolist()]
        scores[np.repeat(at, [len(one) for one in before]), np.concatenate(before) - 1] = -np.inf
    own = scores[at, targets.rows - 1][:, None]
    better = (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
    return np.where((targets.rows > 0) & np.isfinite(own[:, 0]), 1.0 + better, MISS)


def parts(count: int, known: int) -> Iterator[slice]:
    """Slices of targets whose scores fit `_CELLS`."""
    size = int(np.clip(_CELLS // max(1, known), 1, _BATCH))
    return (slice(start, start + size) for start in range(0, count, size))
