"""Model, counts and both over the full catalogue, beside predictors that learned nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from compression.evaluation.catalogue import ranks_by
from compression.evaluation.predictors import Scores, Statistics, Transitions, fused, remembered
from compression.evaluation.targets import Targets, histories_before, metrics
from compression.logs.dataset import Sequences, SplitName
from compression.logs.dataset import split as split_sequences
from compression.retrieval.ensemble import mean_of
from compression.retrieval.judge import user_vectors
from compression.retrieval.network import RetrievalNetwork
from compression.retrieval.release import RetrievalConfig
from features.encoding import Vocabulary

CUTS: Final = (10, 50)
ALL: Final = 2**31

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


def catalogue_scores(
    network: RetrievalNetwork, sequences: Sequences, vocabulary: Vocabulary, known: int
) -> Scores:
    """Dot products of user vectors and the rows of all known items. Nobody without a history is asked for."""
    histories = histories_before(sequences, vocabulary, network.config.max_history)
    table = network.table().detach()[1 : known + 1].numpy().T

    def scores(positions: Int64) -> Float32:
        return np.asarray(user_vectors(network, histories(positions)) @ table, np.float32)

    return scores


def evaluate(
    networks: Sequence[RetrievalNetwork],
    config: RetrievalConfig,
    sequences: Sequences,
    vocabulary: Vocabulary,
    *,
    split_name: SplitName = "leave-one-out",
    limit: int = ALL,
    seed: int = 7,
    filter_seen: bool = True,
) -> dict[str, Any]:
    """HR@k, NDCG@k and MRR on the test items by every predictor. What a version was not fitted on is not
    counted for the counts and the simple predictors either."""
    split = split_sequences(sequences, split_name)
    if config.fitted == "train+validation":
        split = split.with_validation(sequences)
    statistics = Statistics(sequences, split, vocabulary)
    targets = Targets.draw(sequences, split.test, vocabulary, limit=limit, seed=seed)
    if not len(targets.positions):
        return {"split": split.name, "part": "test", "targets": 0}
    # Those with histories of like length together: a batch is as wide as its longest.
    before = targets.positions - sequences.offsets[sequences.user_of(targets.positions)]
    by_length = np.argsort(np.minimum(before, config.network.max_history), kind="stable")
    targets = Targets(targets.positions[by_length], targets.rows[by_length])
    known = statistics.known_items
    model = remembered(
        mean_of([catalogue_scores(network, sequences, vocabulary, known) for network in networks])
    )
    predictors: dict[str, Scores] = {
        "popularity": statistics.popularity_scores,
        "item_to_item": statistics.item_to_item_scores,
        "recent": statistics.recent_scores,
    }
    if config.counts is not None:
        counts = remembered(Transitions(statistics, config.counts).scores)
        predictors["transitions"] = counts
        predictors["fusion"] = fused(model, counts, config.fusion_weight)
    predictors["retrieval"] = model
    seen = statistics.seen if filter_seen else None
    return {
        "split": split.name,
        "part": "test",
        "targets": len(targets.positions),
        "catalogue": known,
        "seen": "filtered" if filter_seen else "ranked",
        "fitted": config.fitted,
        "fusion_weight": config.fusion_weight if config.counts else None,
        **{name: metrics(ranks, CUTS) for name, ranks in ranks_by(predictors, targets, known, seen).items()},
    }
