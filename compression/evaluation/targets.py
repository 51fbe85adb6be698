"""What is to be predicted, what from, and the figures of the ranks that come of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from compression.logs.dataset import Sequences
from features.encoding import HistoryArrays, Vocabulary, encode_histories

CUTS: Final = (10, 20, 50)
MISS: Final = 2**31
"""The rank of what was not ranked."""

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Histories = Callable[[Int64], HistoryArrays]


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


def metrics(ranks: Float64 | Int64, cuts: Sequence[int] = CUTS) -> dict[str, float]:
    """Ranks (1 is best) as HR@k, NDCG@k and MRR, each over all targets."""
    figures: dict[str, float] = {}
    ranks = np.asarray(ranks, np.float64)
    for cut in cuts:
        hit = ranks <= cut
        figures[f"hr@{cut}"] = float(hit.mean()) if len(ranks) else 0.0
        figures[f"ndcg@{cut}"] = float(ndcg_gains(ranks, cut).mean()) if len(ranks) else 0.0
    figures["mrr"] = float(np.where(ranks < MISS, 1.0 / ranks, 0.0).mean()) if len(ranks) else 0.0
    return {name: round(value, 5) for name, value in figures.items()}


def ndcg_gains(ranks: Float64, cut: int) -> Float64:
    """What each target adds to NDCG@cut before the mean."""
    return np.where(ranks <= cut, 1.0 / np.log2(ranks + 1.0), 0.0)
