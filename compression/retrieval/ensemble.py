"""Several networks judged, released and used as one: the mean of their log-chances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compression.evaluation.predictors import Float32, Scores, Statistics, log_chances
from compression.logs.dataset import Sequences, Split
from compression.retrieval.judge import Judge, Verdict
from compression.retrieval.network import RetrievalNetwork
from compression.retrieval.recipe import RetrievalRecipe
from compression.retrieval.trainer import TrainedRetrieval
from features.encoding import Vocabulary


@dataclass(frozen=True, slots=True, eq=False)
class TrainedEnsemble:
    """Networks trained one after the other; `verdict` is of them all and decides how the counts weigh."""

    members: Sequence[TrainedRetrieval]
    verdict: Verdict

    @property
    def networks(self) -> list[RetrievalNetwork]:
        return [member.network for member in self.members]

    @property
    def core_seconds(self) -> float:
        return sum(member.core_seconds for member in self.members)

    @property
    def seconds(self) -> float:
        return sum(member.seconds for member in self.members)


def judged(
    members: Sequence[TrainedRetrieval],
    sequences: Sequences,
    split: Split,
    vocabulary: Vocabulary,
    recipe: RetrievalRecipe,
) -> TrainedEnsemble:
    """The members as one, with what validation says of that. Of a single one, fused with what it was
    fused with in training, its training has said so already."""
    if len(members) == 1 and recipe.fused() == recipe:
        return TrainedEnsemble(members, members[0].selection.verdict)
    statistics = Statistics(sequences, split, vocabulary)
    judge = Judge(sequences, split, vocabulary, statistics, recipe.fused())
    return TrainedEnsemble(members, judge(*(member.network for member in members)))


def mean_of(models: Sequence[Scores]) -> Scores:
    """One model's scores as they are; of several the mean of log P(item)."""
    if len(models) == 1:
        return models[0]

    def scores(positions: np.ndarray) -> Float32:
        of_all = log_chances(models[0](positions))
        for model in models[1:]:
            of_all += log_chances(model(positions))
        of_all /= len(models)
        return of_all

    return scores
