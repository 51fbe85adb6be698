"""What to retrain from, by which recipe, and where the result goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compression.evaluation.verdict import GateLimits
from compression.logs.dataset import MAX_EVENTS, SplitName
from compression.logs.sources import Source
from compression.releases.registry import SERVING
from compression.retrieval.recipe import RetrievalRecipe
from compression.training.checkpoint import EVERY_S
from compression.training.train import Recipe


@dataclass(frozen=True, slots=True)
class RetrainSettings:
    """`retrieval`: train a retrieval network by it; of `recipe` only the sizes of the vocabulary count then.
    `alias` None publishes without promoting. `from_serving` starts from the weights of the version that
    serves; `force` publishes what the gate refuses, with the note."""

    log: Path | Source
    registry: Path
    recipe: Recipe
    retrieval: RetrievalRecipe | None = None
    split: SplitName = "leave-one-out"
    seed: int = 1
    max_events: int = MAX_EVENTS
    alias: str | None = SERVING
    from_serving: bool = False
    force: str | None = None
    limits: GateLimits | None = None  # None: as the environment says
    checkpoint_s: float = EVERY_S
