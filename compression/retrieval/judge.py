"""Validation of a network in training: NDCG@10 over the full catalogue, alone and fused with the counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from compression.evaluation.predictors import MOST_COUNTED, Statistics, Transitions, log_chances
from compression.evaluation.scoring import to_history
from compression.evaluation.targets import Targets, metrics
from compression.evaluation.transitions import COUNTS
from compression.logs.dataset import Sequences, Split
from compression.retrieval.network import RetrievalNetwork
from compression.retrieval.recipe import RetrievalRecipe
from features.encoding import HistoryArrays, Vocabulary, encode_histories

_CELLS: Final = 150_000_000
"""Scores of the counts that are held throughout: half a gigabyte."""
_BATCH: Final = 256

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Verdict:
    """NDCG@10 alone, fused by the best of the weights, and that weight. Without counts both are alone."""

    alone: float
    fused: float
    weight: float


def user_vectors(network: RetrievalNetwork, histories: HistoryArrays) -> Float32:
    """[B, d] after histories, each of at least one event, in as many slots as the longest needs."""
    slots = int(histories.lengths.max())
    cut = HistoryArrays(
        items=histories.items[:, :slots],
        categories=histories.categories[:, :slots],
        behaviors=histories.behaviors[:, :slots],
        gaps=histories.gaps[:, :slots],
        lengths=histories.lengths,
    )
    with torch.inference_mode():
        vectors: Float32 = network.user_vectors(to_history(cut)).float().numpy()
    return vectors


class Judge:
    """The same validation targets every time, what does not change about them worked out once."""

    def __init__(
        self,
        sequences: Sequences,
        split: Split,
        vocabulary: Vocabulary,
        statistics: Statistics,
        recipe: RetrievalRecipe,
    ) -> None:
        self._known = statistics.known_items
        limit = max(1, min(recipe.judge_limit, _CELLS // max(1, self._known)))
        drawn = Targets.draw(sequences, split.validation, vocabulary, limit=limit, seed=3)
        before = drawn.positions - sequences.offsets[sequences.user_of(drawn.positions)]
        by_length = np.argsort(np.minimum(before, recipe.max_history), kind="stable")
        self.targets = targets = Targets(drawn.positions[by_length], drawn.rows[by_length])
        self._parts = [slice(at, at + _BATCH) for at in range(0, len(targets.rows), _BATCH)]
        length = recipe.max_history
        self._histories = [
            encode_histories(sequences.before(targets.positions[part], length), vocabulary, length)
            for part in self._parts
        ]
        seen = [
            statistics.seen(position) if recipe.seen == "filtered" else np.empty(0, np.int64)
            for position in targets.positions.tolist()
        ]
        self._seen = [
            (
                np.repeat(np.arange(len(seen[part])), [len(one) for one in seen[part]]),
                np.concatenate([*seen[part], np.empty(0, np.int64)]) - 1,
            )
            for part in self._parts
        ]
        self._counts: list[Float32] | None = None
        self._weights: tuple[float, ...] = (0.0,)
        if recipe.counts is not None and len(sequences) <= MOST_COUNTED:
            counts = Transitions(statistics, COUNTS[recipe.counts])
            self._counts = [counts.scores(targets.positions[part]) for part in self._parts]
            self._weights = tuple(sorted({0.0, *recipe.fusion_weights}))

    def __call__(self, *networks: RetrievalNetwork) -> Verdict:
        """Of one network, or of the mean of the log-chances of several."""
        for network in networks:
            network.eval()
        tables = [network.table().detach()[1 : self._known + 1].numpy().T for network in networks]
        ranks: dict[float, list[Float64]] = {weight: [] for weight in self._weights}
        for at, part in enumerate(self._parts):
            scores = np.zeros((len(self.targets.rows[part]), self._known), np.float32)
            for network, table in zip(networks, tables, strict=True):
                scores += log_chances(user_vectors(network, self._histories[at]) @ table)
            scores /= len(networks)
            scores[self._seen[at]] = -np.inf
            for weight, found in ranks.items():
                found.append(self._ranks(scores, at, weight, self.targets.rows[part]))
        by_weight = {
            weight: metrics(np.concatenate(found), (10,))["ndcg@10"] if found else 0.0
            for weight, found in ranks.items()
        }
        best = max(by_weight, key=lambda weight: by_weight[weight])
        return Verdict(by_weight[0.0], by_weight[best], best)

    def _ranks(self, scores: Float32, at: int, weight: float, rows: Int64) -> Float64:
        if weight and self._counts is not None:
            scores = scores + np.float32(weight) * self._counts[at]
        own = scores[np.arange(len(rows)), rows - 1][:, None]
        better = (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
        return np.where((rows > 0) & np.isfinite(own[:, 0]), 1.0 + better, 2.0**31)
