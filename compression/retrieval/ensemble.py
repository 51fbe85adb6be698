"""Several networks trained, judged, released and used as one: the mean of their log-chances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from compression.evaluation.predictors import Float32, Scores, Statistics, log_chances
from compression.logs.dataset import Sequences, Split
from compression.retrieval.judge import Judge, Verdict
from compression.retrieval.network import RetrievalNetwork
from compression.retrieval.recipe import RetrievalRecipe
from compression.retrieval.retriever import stand_in
from compression.retrieval.trainer import TrainedRetrieval, train
from features.encoding import Vocabulary

_APART: Final = 1_000
"""From a network's seed to the next one's: further apart than seeds that are asked for."""


@dataclass(frozen=True, slots=True)
class Member:
    """One network of a version that is to be trained: recipe, seed, and the folder of its trainings."""

    recipe: RetrievalRecipe
    seed: int
    folder: Path


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


def seed_of(seed: int, number: int) -> int:
    """The seed of one of the networks of a version."""
    return seed + _APART * number


def train_all(
    members: Sequence[Member],
    sequences: Sequences,
    split: Split,
    vocabulary: Vocabulary,
    recipe: RetrievalRecipe,
    progress: Callable[[int, float, str], None],
) -> TrainedEnsemble:
    """Train them one after the other, judge them as one, and have items that are not known stand for those
    that are. `progress`: which member, the fraction of its training, what it is doing."""
    trained = [
        train(
            sequences,
            split,
            vocabulary,
            member.recipe,
            seed=member.seed,
            folder=member.folder / "train",
            progress=partial(progress, number),
        )
        for number, member in enumerate(members)
    ]
    whole = judged(trained, sequences, split, vocabulary, recipe)
    stand_in(whole.networks, len(vocabulary.item_ids))
    return whole


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
