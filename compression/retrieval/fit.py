"""From a log to released retrieval models: trained, judged and published, under one or both protocols.

(a) `train`: fitted without a user's last two items, the last but one being what validation selects by.
(b) `train+validation`: after selection fitted anew, model and counts, with the last but one too.

What online counts weigh where a version serves is chosen as `tailrace retrain` chooses it, by validation
lists made as they are served, with the network of (a): that of (b) has learnt what validation asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from compression.evaluation.fusion import fuse
from compression.logs.dataset import Log, Split, build_vocabulary, leave_one_out
from compression.releases.registry import Manifest, Registry
from compression.retrieval.ensemble import Member, TrainedEnsemble, seed_of, train_all
from compression.retrieval.recipe import RetrievalRecipe
from compression.retrieval.release import Fitted, config_of, publish
from compression.retrieval.retriever import Retriever, RetrieverScorer, stand_in
from compression.retrieval.table import evaluate
from compression.retrieval.trainer import refit
from features.encoding import Vocabulary
from features.fusion import Fusion
from features.settings import FeatureSettings

PROTOCOLS: Final[tuple[Fitted, ...]] = ("train", "train+validation")

FUSED: Final = 1_000
"""Targets of validation, and of the test, that the weights of online counts are judged by."""

Progress = Callable[[str, float, str], None]  # step, fraction of the step, what it is doing


@dataclass(frozen=True, slots=True)
class FitSettings:
    """The version holds the recipe's networks once for each of `seeds`. `state` is a folder for what a
    killed training goes on from; one for each log, recipe and seed is made in it. `log_sha256` and
    `log_name` are for the manifest."""

    recipe: RetrievalRecipe
    seeds: Sequence[int]
    registry: Path
    state: Path
    log_name: str
    log_sha256: str
    protocols: Sequence[Fitted] = PROTOCOLS


def fit(log: Log, settings: FitSettings, progress: Progress | None = None) -> list[Manifest]:
    """A published version for each protocol. Metrics in its manifest are those of the test items."""
    registry = Registry(settings.registry)
    registry.check_publishing()
    recipe, sequences = settings.recipe, log.sequences
    split = leave_one_out(sequences)
    vocabulary = build_vocabulary(sequences, max_items=recipe.max_items, item_buckets=1, category_buckets=2)

    members = _members(settings)

    def tell(step: str, number: int, fraction: float, note: str) -> None:
        if progress:
            progress(f"{step} {number + 1}" if len(members) > 1 else step, fraction, note)

    whole = train_all(members, sequences, split, vocabulary, recipe, partial(tell, "train"))
    lists = _served(whole, log, split, vocabulary)
    released = []
    if "train" in settings.protocols:
        released.append(_release(registry, whole, "train", log, vocabulary, settings, lists))
    if "train+validation" in settings.protocols:
        again = [
            refit(
                sequences,
                split,
                vocabulary,
                member.recipe,
                one.selection,
                seed=member.seed,
                folder=member.folder / "-".join(["refit", *map(str, one.selection.epochs)]),
                progress=partial(tell, "refit", number),
            )
            for number, (member, one) in enumerate(zip(members, whole.members, strict=True))
        ]
        anew = TrainedEnsemble(again, whole.verdict)
        stand_in(anew.networks, len(vocabulary.item_ids))
        released.append(_release(registry, anew, "train+validation", log, vocabulary, settings, lists))
    return released


def _members(settings: FitSettings) -> list[Member]:
    members = []
    for seed in settings.seeds:
        for number, recipe in enumerate(settings.recipe.of_members()):
            own = seed_of(seed, number)
            folder = f"{settings.log_sha256[:12]}-{recipe.digest()}-seed-{own}"
            members.append(Member(recipe, own, settings.state / folder))
    return members


def _release(
    registry: Registry,
    trained: TrainedEnsemble,
    fitted: Fitted,
    log: Log,
    vocabulary: Vocabulary,
    settings: FitSettings,
    lists: dict[str, Any],
) -> Manifest:
    config = config_of(trained, settings.recipe, fitted)
    metrics = evaluate(trained.networks, config, log.sequences, vocabulary)
    data: dict[str, Any] = {
        "log": settings.log_name,
        "sha256": settings.log_sha256,
        "events": len(log.sequences),
        "users": len(log.sequences.users),
        "bad_rows": log.report.bad_rows,
        "split": "leave-one-out",
        "seed": settings.seeds[0],
        "seeds": list(settings.seeds),
    }
    return publish(
        registry,
        trained,
        config,
        vocabulary,
        recipe=settings.recipe,
        fusion=Fusion(**lists["weights"]),
        metrics=metrics | {"lists": lists},
        data=data,
    )


def _served(trained: TrainedEnsemble, log: Log, split: Split, vocabulary: Vocabulary) -> dict[str, Any]:
    """`fuse` with histories as long as they are kept, and the network they were judged with."""
    settings, retriever = FeatureSettings(), Retriever(trained.networks)
    found = fuse(
        RetrieverScorer(retriever),
        log.sequences,
        split,
        vocabulary,
        max_history=min(retriever.max_history, settings.sequence_events),
        limit=FUSED,
        settings=settings,
    )
    return found | {"fitted": "train", "seen_filter": settings.seen_filter}
