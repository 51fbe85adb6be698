"""How good a model is on a log: HR@k, NDCG@k and MRR, beside predictors that learned nothing.

Full catalogue: every known item is ranked by the retrieval head, by transition counts, and by both:
log P(item) by the model plus a weight times the counts' score, the weight chosen on validation. Items
the user has seen are included (people come back to them) unless they are to be filtered, as published
figures on films and books do. Fifty candidates: the ranking head orders the item that came next among
items drawn from the user's recent ones, the category at hand and the popular; the draw does not depend
on the model, so figures of two models compare. An item the vocabulary lacks counts as a miss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from compression.evaluation.predictors import (
    FUSION_WEIGHTS,
    MOST_COUNTED,
    Scores,
    Statistics,
    Transitions,
    fused,
    log_chances,
)
from compression.evaluation.scoring import Scorer, row_categories
from compression.evaluation.transitions import PUBLISHED
from compression.logs.dataset import Sequences, Split
from features.encoding import HistoryArrays, Vocabulary, encode_histories
from topics.messages import BEHAVIORS

CANDIDATES: Final = 50
CUTS: Final = (10, 20, 50)
_RECENT: Final = 10
_SAME_CATEGORY: Final = 20
_BATCH: Final = 256
_MISS: Final = 2**31
_CHOOSING: Final = 1_000  # validation targets that settings and weights are chosen by
_CELLS: Final = 25_000_000  # scores held at once

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Histories = Callable[[Int64], HistoryArrays]


def metrics(ranks: Float64 | Int64, cuts: Sequence[int] = CUTS) -> dict[str, float]:
    """Ranks (1 is best) as HR@k, NDCG@k and MRR, each over all targets."""
    figures: dict[str, float] = {}
    ranks = np.asarray(ranks, np.float64)
    for cut in cuts:
        hit = ranks <= cut
        figures[f"hr@{cut}"] = float(hit.mean()) if len(ranks) else 0.0
        figures[f"ndcg@{cut}"] = float(ndcg_gains(ranks, cut).mean()) if len(ranks) else 0.0
    figures["mrr"] = float(np.where(ranks < _MISS, 1.0 / ranks, 0.0).mean()) if len(ranks) else 0.0
    return {name: round(value, 5) for name, value in figures.items()}


def ndcg_gains(ranks: Float64, cut: int) -> Float64:
    """What each target adds to NDCG@cut before the mean."""
    return np.where(ranks <= cut, 1.0 / np.log2(ranks + 1.0), 0.0)


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
    for part in _parts(len(judged.positions), known):
        some = Targets(judged.positions[part], judged.rows[part])
        of_model, of_counts = log_chances(model(some.positions)), counts(some.positions)
        for weight, found in ranks.items():
            scores = of_model + np.float32(weight) * of_counts
            found.append(_ranks(scores, some, seen))
    return max(ranks, key=lambda weight: _ndcg(np.concatenate(ranks[weight])))


def _ndcg(ranks: Float64) -> float:
    return metrics(ranks, (10,))["ndcg@10"]


def retrieval_scores(scorer: Scorer, histories: Histories, known: int) -> Scores:
    """By the retrieval head: user vectors against the item table."""
    table = scorer.item_table()[1 : known + 1].T

    def scores(positions: Int64) -> Float32:
        return np.asarray(scorer.user_vectors(histories(positions)) @ table, np.float32)

    return scores


def full_catalogue(scorer: Scorer, histories: Histories, targets: Targets, known: int) -> Float64:
    """The rank of each target among all known items, by the retrieval head."""
    return catalogue_ranks(retrieval_scores(scorer, histories, known), targets, known)


def catalogue_ranks(
    scores: Scores, targets: Targets, known: int, seen: Callable[[int], Int64] | None = None
) -> Float64:
    """The rank of each target among all `known` items but those its user has `seen`; one that was seen
    is a miss. Ties count half."""
    return ranks_by({"": scores}, targets, known, seen)[""]


def ranks_by(
    predictors: Mapping[str, Scores],
    targets: Targets,
    known: int,
    seen: Callable[[int], Int64] | None = None,
) -> dict[str, Float64]:
    """As above, by each of several predictors, which are asked for the same positions in turn."""
    ranks = {name: np.empty(len(targets.positions)) for name in predictors}
    for part in _parts(len(targets.positions), known):
        some = Targets(targets.positions[part], targets.rows[part])
        for name, scores in predictors.items():
            ranks[name][part] = _ranks(scores(some.positions), some, seen)
    return ranks


def _ranks(scores: Float32, targets: Targets, seen: Callable[[int], Int64] | None) -> Float64:
    """Of targets whose `scores` [B, known] are given, and are written to."""
    at = np.arange(len(targets.rows))
    if seen is not None:
        before = [seen(position) for position in targets.positions.tolist()]
        scores[np.repeat(at, [len(one) for one in before]), np.concatenate(before) - 1] = -np.inf
    own = scores[at, targets.rows - 1][:, None]
    better = (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
    return np.where((targets.rows > 0) & np.isfinite(own[:, 0]), 1.0 + better, _MISS)


def _parts(count: int, known: int) -> Iterator[slice]:
    """Slices of targets whose scores fit `_CELLS`."""
    size = int(np.clip(_CELLS // max(1, known), 1, _BATCH))
    return (slice(start, start + size) for start in range(0, count, size))


def draw_candidates(
    sequences: Sequences, targets: Targets, statistics: Statistics, vocabulary: Vocabulary, *, seed: int
) -> Int64:
    """[targets, 50] item rows; the first is the target, the others differ from it and one another."""
    rng = np.random.default_rng(seed)
    size = min(CANDIDATES, statistics.known_items)
    weights = np.cumsum(statistics.counts[1:] ** 0.75 + 1e-3)
    category_rows = vocabulary.category_rows_of(sequences.categories[np.maximum(targets.positions - 1, 0)])
    drawn = np.empty((len(targets.positions), size), np.int64)
    for at, (position, row) in enumerate(zip(targets.positions.tolist(), targets.rows.tolist(), strict=True)):
        recent = statistics.recent(position)[::-1][:30].tolist()
        near = statistics.of_category(int(category_rows[at]))
        near = rng.choice(near, min(len(near), _SAME_CATEGORY), replace=False) if len(near) else near
        popular = 1 + np.searchsorted(weights, rng.random(4 * size) * weights[-1])
        chosen = dict.fromkeys([row])
        chosen.update(dict.fromkeys([r for r in dict.fromkeys(recent) if r][:_RECENT]))
        chosen.update(dict.fromkeys([*near.tolist(), *popular.tolist()]))
        if len(chosen) < size:
            filler = rng.permutation(statistics.known_items)[: 2 * size] + 1
            chosen.update(dict.fromkeys(filler.tolist()))
        drawn[at] = list(chosen)[:size]
    return drawn


def among_candidates(
    scorer: Scorer, histories: Histories, targets: Targets, vocabulary: Vocabulary, candidates: Int64
) -> Float64:
    """The rank of each target among its candidates, by the ranking head."""
    of_row = row_categories(vocabulary)
    ranks = np.empty(len(targets.positions))
    for start in range(0, len(ranks), _BATCH):
        part = slice(start, start + _BATCH)
        asked = candidates[part].astype(np.int32)
        scores = scorer.rank(histories(targets.positions[part]), asked, of_row[asked])
        ranks[part] = _ranks_of_first(scores, targets.rows[part])
    return ranks


def baseline_among(
    sequences: Sequences, targets: Targets, statistics: Statistics, candidates: Int64
) -> dict[str, Float64]:
    """The ranks of the targets among their candidates, by the simple predictors."""
    popularity = statistics.counts[candidates] / (1.0 + statistics.counts.max())
    item_to_item, recent = popularity.copy(), popularity.copy()
    for at, position in enumerate(targets.positions.tolist()):
        newest = statistics.newest_first(position)
        follows = statistics.followers(newest[:5])
        age = {row: len(newest) - place for place, row in enumerate(newest)}
        listed = candidates[at].tolist()
        item_to_item[at] += [1e3 * follows.get(row, 0.0) for row in listed]
        recent[at] += [float(age.get(row, 0)) for row in listed]
    return {
        "popularity": _ranks_of_first(popularity, targets.rows),
        "item_to_item": _ranks_of_first(item_to_item, targets.rows),
        "recent": _ranks_of_first(recent, targets.rows),
    }


def _ranks_of_first(scores: npt.NDArray[np.floating[Any]], rows: Int64) -> Float64:
    others, own = scores[:, 1:], scores[:, :1]
    better = (others > own).sum(1) + (others == own).sum(1) / 2
    return np.asarray(np.where(rows > 0, 1.0 + better, _MISS), np.float64)
