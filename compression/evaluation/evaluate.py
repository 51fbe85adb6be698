"""How good a model is on a log: HR@k, NDCG@k and MRR, beside predictors that learned nothing.

Full catalogue: every known item is ranked by the retrieval head, by transition counts, and by both:
log P(item) by the model plus a weight times the counts' score, the weight chosen on validation. Items
the user has seen are included (people come back to them) unless they are to be filtered, as published
figures on films and books do. Fifty candidates: the ranking head orders the item that came next among
items drawn from the user's recent ones, the category at hand and the popular; the draw does not depend
on the model, so figures of two models compare. An item the vocabulary lacks counts as a miss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from compression.evaluation.among import among_candidates, baseline_among, draw_candidates
from compression.evaluation.catalogue import catalogue_ranks, parts, ranks_of, retrieval_scores
from compression.evaluation.predictors import (
    FUSION_WEIGHTS,
    MOST_COUNTED,
    Scores,
    Statistics,
    Transitions,
    fused,
    log_chances,
)
from compression.evaluation.scoring import Scorer
from compression.evaluation.targets import Float64, Int64, Targets, histories_before, metrics
from compression.evaluation.transitions import PUBLISHED
from compression.logs.dataset import Sequences, Split
from features.encoding import Vocabulary
from topics.messages import BEHAVIORS

_CHOOSING: Final = 1_000  # validation targets that settings and weights are chosen by


def evaluate(
    scorer: Scorer,
    sequences: Sequences,
    split: Split,
    vocabulary: Vocabulary,
    *,
    max_history: int,
    limit: int = 5_000,
    seed: int = 7,
    part: str = "test",
    filter_seen: bool = False,
    count: bool = True,
) -> dict[str, Any]:
    """The whole report: model and baselines, full catalogue and among fifty. `filter_seen`: over the full
    catalogue no item is ranked that the user has had. `count`: transition counts and the fusion too, which
    costs several times the rest."""
    statistics = Statistics(sequences, split, vocabulary)
    positions = split.test if part == "test" else split.validation
    targets = Targets.draw(sequences, positions, vocabulary, limit=limit, seed=seed)
    if not len(targets.positions):
        return {"split": split.name, "part": part, "targets": 0}
    histories = histories_before(sequences, vocabulary, max_history)
    model = retrieval_scores(scorer, histories, statistics.known_items)
    judged = None
    if count and len(sequences) <= MOST_COUNTED:
        judged = Targets.draw(sequences, split.validation, vocabulary, limit=_CHOOSING, seed=3)
    full, chosen = _full_catalogue(model, statistics, targets, judged, filter_seen)
    asked = draw_candidates(sequences, targets, statistics, vocabulary, seed=seed)
    ranking = among_candidates(scorer, histories, targets, vocabulary, asked)
    simple = baseline_among(sequences, targets, statistics, asked)
    revisits = [
        row in statistics.recent(position)
        for position, row in zip(targets.positions.tolist(), targets.rows.tolist(), strict=True)
    ]
    return {
        "split": split.name,
        "part": part,
        "targets": len(targets.positions),
        "catalogue": len(vocabulary.item_ids),
        "seen": "filtered" if filter_seen else "ranked",
        "unseen_targets": round(float((statistics.counts[targets.rows] == 0).mean()), 5),
        "revisited_targets": round(float(np.mean(revisits)), 5),
        **{name: metrics(ranks) for name, ranks in full.items()},
        **chosen,
        "ranking_50": metrics(ranking, (1, 5, 10)),
        "popularity_50": metrics(simple["popularity"], (1, 5, 10)),
        "item_to_item_50": metrics(simple["item_to_item"], (1, 5, 10)),
        "recent_50": metrics(simple["recent"], (1, 5, 10)),
        "by_behavior": by_behavior(
            sequences.behaviors[targets.positions], {"retrieval": full["retrieval"]}, {"ranking_50": ranking}
        ),
    }


def by_behavior(
    behaviors: Int64, full: Mapping[str, Float64], among: Mapping[str, Float64]
) -> dict[str, dict[str, Any]]:
    """For each behaviour that occurs: how many targets were of it, and the figures of these alone, by
    predictor over the `full` catalogue and `among` fifty."""
    found: dict[str, dict[str, Any]] = {}
    for code, name in enumerate(BEHAVIORS):
        of_it = behaviors == code
        if of_it.any():
            found[name] = {
                "targets": int(of_it.sum()),
                **{predictor: metrics(ranks[of_it]) for predictor, ranks in full.items()},
                **{predictor: metrics(ranks[of_it], (1, 5, 10)) for predictor, ranks in among.items()},
            }
    return found


def _full_catalogue(
    model: Scores, statistics: Statistics, targets: Targets, judged: Targets | None, filter_seen: bool
) -> tuple[dict[str, Float64], dict[str, Any]]:
    """The ranks of the targets by every predictor, and what was chosen by those to be `judged` by; without
    any there are no transition counts."""
    known = statistics.known_items
    seen = statistics.seen if filter_seen else None
    predictors: dict[str, Scores] = {
        "retrieval": model,
        "popularity": statistics.popularity_scores,
        "item_to_item": statistics.item_to_item_scores,
        "recent": statistics.recent_scores,
    }
    chosen: dict[str, Any] = {}
    if judged is not None:
        counts = {name: Transitions(statistics, one).scores for name, one in PUBLISHED.items()}
        best = max(counts, key=lambda name: _ndcg(catalogue_ranks(counts[name], judged, known, seen)))
        weight = _best_weight(model, counts[best], judged, known, seen)
        predictors |= {"transitions": counts[best], "fusion": fused(model, counts[best], weight)}
        chosen = {"transitions_settings": best, "fusion_weight": weight}
    return {name: catalogue_ranks(one, targets, known, seen) for name, one in predictors.items()}, chosen


def _best_weight(
    model: Scores, counts: Scores, judged: Targets, known: int, seen: Callable[[int], Int64] | None
) -> float:
    """The weight of the counts by which validation ranks best."""
    ranks: dict[float, list[Float64]] = {weight: [] for weight in FUSION_WEIGHTS}
    for part in parts(len(judged.positions), known):
        some = Targets(judged.positions[part], judged.rows[part])
        of_model, of_counts = log_chances(model(some.positions)), counts(some.positions)
        for weight, found in ranks.items():
            scores = of_model + np.float32(weight) * of_counts
            found.append(ranks_of(scores, some, seen))
    return max(ranks, key=lambda weight: _ndcg(np.concatenate(ranks[weight])))


def _ndcg(ranks: Float64) -> float:
    return metrics(ranks, (10,))["ndcg@10"]
