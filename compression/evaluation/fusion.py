"""How much of the online statistics is added to the network's scores, chosen on validation.

Lists are made as they are served: candidates from the statistics of the training part and from the network,
scored by both. A weight is changed only where that ranks the validation targets better, one source after
the other; the test targets then say what it brings. Items that the training part lacks are as new to the
network as any item that turns up after a release: they stand in their hash bucket and are not retrieved.
Judged by rows of their own they would all be known, and the user's own events weigh too little (HR@10 of
later clicks in `users_1k` 0.07 instead of 0.14).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from compression.evaluation.log_statistics import LogStatistics
from compression.evaluation.scoring import Scorer, row_categories
from compression.evaluation.targets import MISS, Targets, metrics
from compression.logs.dataset import Sequences, Split
from features.candidates import find_candidates
from features.encoding import Vocabulary, encode_histories
from features.fusion import Fusion
from features.settings import FeatureSettings
from features.statistics import StatisticsReader

SOURCES: Final = ("transition", "recent", "category", "popular")
WEIGHTS: Final = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
LEAST_GAIN: Final = 0.0005
"""Of NDCG@10: less is chance, and the smaller weight stays."""
CUTS: Final = (1, 10, 50)
_ROUNDS: Final = 3
_RETRIEVED: Final = 100
_BATCH: Final = 256
_CELLS: Final = 25_000_000  # scores held at once

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


class Trained:
    """Rows of items and categories as after a release: only what was trained on is known."""

    def __init__(self, vocabulary: Vocabulary, items: Int64) -> None:
        """`items` are those that were trained on."""
        self.known = np.isin(vocabulary.item_ids, items)
        self._vocabulary = vocabulary
        self._seen = np.concatenate([[True], self.known, np.ones(vocabulary.item_buckets, np.bool_)])

    def item_rows_of(self, ids: Int64) -> Int32:
        rows = self._vocabulary.item_rows_of(ids)
        return np.where(self._seen[rows], rows, self._vocabulary.bucket_rows_of(ids))

    def category_rows_of(self, ids: Int64) -> Int32:
        return self._vocabulary.category_rows_of(ids)


@dataclass(frozen=True, slots=True, eq=False)
class Lists:
    """Candidates of some targets: the network's scores [targets, width], minus infinity beyond the last;
    the place of each target among them, -1 where it is not; what a weight of 1 adds, by source."""

    scores: Float32
    places: Int64
    evidence: dict[str, Float32]

    def ranks(self, fusion: Fusion) -> Float64:
        """1 is best; equal scores keep the order of the candidates, as in a served list."""
        scores = self.scores.copy()
        for source in SOURCES:
            scores += np.float32(getattr(fusion, source)) * self.evidence[source]
        own = np.take_along_axis(scores, np.maximum(self.places, 0)[:, None], axis=1)
        earlier = np.arange(scores.shape[1]) < self.places[:, None]
        before = (scores > own) | ((scores == own) & earlier)
        return np.where(self.places < 0, MISS, 1.0 + before.sum(axis=1))

    def ndcg(self, fusion: Fusion) -> float:
        return metrics(self.ranks(fusion), (10,))["ndcg@10"]


def choose(lists: Lists) -> Fusion:
    """The weights that rank these targets best; none where none does."""
    best, chosen = lists.ndcg(Fusion()), Fusion()
    for _ in range(_ROUNDS):
        before = chosen
        for source in SOURCES:
            for weight in WEIGHTS:
                tried = chosen.model_copy(update={source: weight})
                found = lists.ndcg(tried)
                if found >= best + LEAST_GAIN:
                    best, chosen = found, tried
        if chosen == before:
            break
    return chosen


def fuse(
    scorer: Scorer,
    sequences: Sequences,
    split: Split,
    vocabulary: Vocabulary,
    *,
    max_history: int,
    limit: int,
    seed: int = 7,
    settings: FeatureSettings | None = None,
) -> dict[str, Any]:
    """The weights (`weights`), and HR, NDCG and MRR of the next item in the served list without and with
    them (`network`, `fused`), by at most `limit` targets of validation and as many of the test."""
    settings = settings or FeatureSettings()
    trained = split.train_positions(sequences)
    statistics = LogStatistics(sequences, trained, settings)
    rows = Trained(vocabulary, sequences.items[trained])
    judged, tested = (
        lists_of(
            scorer,
            sequences,
            Targets.draw(sequences, positions, vocabulary, limit=limit, seed=seed),
            vocabulary,
            rows,
            statistics,
            max_history=max_history,
            settings=settings,
        )
        for positions in (split.validation, split.test)
    )
    fusion = choose(judged) if len(judged.places) else Fusion()
    return {
        "weights": fusion.model_dump(),
        "targets": len(tested.places),
        "network": metrics(tested.ranks(Fusion()), CUTS),
        "fused": metrics(tested.ranks(fusion), CUTS),
    }


def lists_of(
    scorer: Scorer,
    sequences: Sequences,
    targets: Targets,
    vocabulary: Vocabulary,
    known_rows: Trained,
    statistics: StatisticsReader,
    *,
    max_history: int,
    settings: FeatureSettings,
) -> Lists:
    """What would be served for the events before each target."""
    limit = settings.candidate_limit
    count = len(targets.positions)
    scores = np.full((count, limit), -np.inf, np.float32)
    places = np.full(count, -1, np.int64)
    evidence = {source: np.zeros((count, limit), np.float32) for source in SOURCES}
    of_row = row_categories(vocabulary)
    known = len(vocabulary.item_ids)
    table = scorer.item_table()[1 : known + 1].T

    def capped(items: Int64) -> npt.NDArray[np.integer[Any]]:
        rows = known_rows.item_rows_of(items)
        return np.where(rows <= known, of_row[rows], -1)

    size = int(np.clip(_CELLS // max(1, known), 1, _BATCH))
    for start in range(0, count, size):
        part = slice(start, start + size)
        positions = targets.positions[part]
        histories = sequences.before(positions, max_history)
        arrays = encode_histories(histories, known_rows, max_history)
        products = np.where(known_rows.known, scorer.user_vectors(arrays) @ table, -np.inf)
        nearest = np.argpartition(-products, min(_RETRIEVED, known) - 1, axis=1)[:, :_RETRIEVED]
        retrieved = vocabulary.item_ids[nearest], np.take_along_axis(products, nearest, axis=1)
        for source in SOURCES:
            found = find_candidates(
                histories,
                statistics,
                retrieved=retrieved,
                category_of=capped,
                settings=settings,
                fusion=Fusion(**{source: 1.0}),
            )
            if found.evidence is not None:
                evidence[source][part, : found.items.shape[1]] = found.evidence
        width = found.items.shape[1]
        rows = known_rows.item_rows_of(found.items)
        filled = np.arange(width) < found.counts[:, None]
        scores[part, :width] = np.where(filled, scorer.rank(arrays, rows, of_row[rows]), -np.inf)
        hit = filled & (found.items == sequences.items[positions][:, None])
        places[part] = np.where(hit.any(axis=1), hit.argmax(axis=1), -1)
    return Lists(scores, places, evidence)
