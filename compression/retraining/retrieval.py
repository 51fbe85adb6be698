"""The steps of a retraining that trains a retrieval network: one step is another, the gate is the same.

Training keeps its state after every epoch and goes on there. What it ends with is written as it will be
released, so that later steps read it from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from compression.evaluation.scoring import Scorer
from compression.retraining.pipeline import STAGING, StepVoice, Work
from compression.retrieval.ensemble import TrainedEnsemble, judged
from compression.retrieval.export import graphs_of
from compression.retrieval.fit import seed_of
from compression.retrieval.parity import check_parity
from compression.retrieval.recipe import RetrievalRecipe
from compression.retrieval.release import (
    NETWORK,
    RetrievalConfig,
    build,
    config_of,
    shape_of,
    stage,
)
from compression.retrieval.retriever import Retriever, RetrieverScorer, stand_in
from compression.retrieval.trainer import train
from compression.training.checkpoint import Stopped
from features.sequence import MAX_EVENTS

_TRAININGS: Final = "trainings"


class RetrievalWork(Work):
    """One process trains, from random weights, and nothing is compressed."""

    @property
    def recipe(self) -> RetrievalRecipe:
        assert self.settings.retrieval is not None
        return self.settings.retrieval

    def tell(self, name: str, fraction: float, note: str) -> None:
        super().tell(name, fraction, note)
        if self.stopping():
            raise Stopped(f"asked to end during {name}")

    def train(self, tell: StepVoice) -> dict[str, Any]:
        kept, recipe = self.kept, self.recipe
        members = recipe.of_members()
        trained = [
            train(
                kept.sequences,
                kept.split,
                kept.vocabulary,
                member,
                seed=seed_of(self.settings.seed, number),
                folder=self.run.folder / _TRAININGS / str(number),
                progress=lambda part, note, number=number: tell((number + part) / len(members), note),  # type: ignore[misc]
            )
            for number, member in enumerate(members)
        ]
        whole = judged(trained, kept.sequences, kept.split, kept.vocabulary, recipe)
        stand_in(whole.networks, len(kept.vocabulary.item_ids))
        config = config_of(whole, recipe, "train")
        self.run.clear(STAGING)
        self.staging.mkdir()
        stage(Retriever(whole.networks), config, kept.vocabulary, self.staging)
        self.run.clear(_TRAININGS)
        return {"shape": shape_of(config, kept.vocabulary).model_dump()} | _account(whole)

    @property
    def longest(self) -> int:
        """As a worker has it: longer sequences are kept of nobody."""
        return min(MAX_EVENTS, self.recipe.max_history)

    def scorer(self) -> Scorer:
        return RetrieverScorer(self._retriever())

    def export(self, _: StepVoice) -> dict[str, Any]:
        """The graphs are there; that they answer as the networks is looked at here."""
        retriever = self._retriever()
        return {"graphs": graphs_of(retriever), "parity": check_parity(retriever, self.staging)}

    def _retriever(self) -> Retriever:
        folder: Path = self.staging
        config = RetrievalConfig.model_validate_json((folder / NETWORK).read_bytes())
        return Retriever(build(config, lambda name: (folder / name).read_bytes(), self.run.state.version))


def _account(whole: TrainedEnsemble) -> dict[str, Any]:
    """What the step says of the training: epochs of all networks in a row, and which was the best. An epoch
    that was not judged has the figure of the one judged before it."""
    epochs: list[dict[str, Any]] = []
    ndcg = 0.0
    for member in whole.members:
        for epoch in member.epochs:
            ndcg = epoch.verdict.alone if epoch.verdict else ndcg
            told = {"retrieval_loss": epoch.loss, "retrieval_ndcg": round(ndcg, 5), "seconds": epoch.seconds}
            epochs.append({"number": len(epochs) + 1, **told})
    gains = [epoch["retrieval_ndcg"] for epoch in epochs]
    return {
        "epochs": epochs,
        "best": int(np.argmax(gains)) + 1,
        "selected": [list(member.selection.epochs) for member in whole.members],
        "stopped": ", ".join(dict.fromkeys(member.stopped for member in whole.members)),
    }
