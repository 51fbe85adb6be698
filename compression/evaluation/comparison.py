"""Two versions on the same events, user by user."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from compression.evaluation.among import among_candidates, draw_candidates
from compression.evaluation.catalogue import full_catalogue
from compression.evaluation.predictors import Statistics
from compression.evaluation.targets import Targets, histories_before, ndcg_gains
from compression.evaluation.verdict import Check, GateLimits, Judged
from compression.logs.dataset import Sequences, Split
from features.encoding import Vocabulary

RESAMPLES: Final = 2_000
HEADS: Final = ("retrieval", "ranking")
_CUT: Final = 10
_CELLS: Final = 4_000_000  # weights of users held at once

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Gains = tuple[Float64, Float64, Int64]  # ours, theirs, and whose


def both_heads(
    candidate: Judged, other: Judged, sequences: Sequences, split: Split, targets: Targets, seed: int
) -> Iterator[tuple[str, Gains]]:
    """By head the NDCG@10 of every target: the candidate's and the other's on the same events."""
    statistics = Statistics(sequences, split, candidate.vocabulary)
    asked = draw_candidates(sequences, targets, statistics, candidate.vocabulary, seed=seed)
    ours = _gains(candidate, candidate.vocabulary, sequences, targets, asked)
    theirs = _gains(other, candidate.vocabulary, sequences, targets, asked)
    users = sequences.user_of(targets.positions)
    for head, mine, other_gains in zip(HEADS, ours, theirs, strict=True):
        yield head, (mine, other_gains, users)


def compared(
    name: str,
    other: str,
    ours: Float64,
    theirs: Float64,
    users: Int64,
    margin: float,
    limits: GateLimits,
    seed: int,
    *,
    sure: bool,
) -> Check:
    """Whether the mean difference is allowed. `sure`: refused is what is worse by more than the margin with
    confidence, not only on average."""
    low, high = paired_bootstrap(ours - theirs, users, confidence=limits.confidence, seed=seed)
    difference, before = float((ours - theirs).mean()), float(theirs.mean())
    worst = -margin * before
    refused = (high if sure else difference) < worst
    interval = f"[{low:+.4f}, {high:+.4f}]"
    what = f"NDCG@10 {ours.mean():.4f} against {before:.4f}: {difference:+.4f} {interval}"
    why = f" is worse than {worst:+.4f}" + (f" at {limits.confidence:.0%}" if sure else "")
    return Check(
        name=name,
        outcome="refused" if refused else "passed",
        value=round(difference, 6),
        limit=round(worst, 6),
        detail=what + (why if refused else ""),
        figures={
            "candidate": round(float(ours.mean()), 6),
            other: round(before, 6),
            "low": round(low, 6),
            "high": round(high, 6),
            "users": float(len(np.unique(users))),
        },
    )


def paired_bootstrap(
    differences: Float64,
    users: Int64,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 7,
) -> tuple[float, float]:
    """The interval of the mean difference of targets when users are drawn anew: percentiles of
    `resamples` draws (Efron and Tibshirani, chapter 13)."""
    _, who = np.unique(users, return_inverse=True)
    sums, counts = np.bincount(who, differences), np.bincount(who).astype(np.float64)
    rng, people = np.random.default_rng(seed), len(sums)
    means: list[Float64] = []
    size = max(1, _CELLS // people)
    for start in range(0, resamples, size):
        drawn = rng.multinomial(people, np.full(people, 1 / people), min(size, resamples - start))
        means.append((drawn @ sums) / (drawn @ counts))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def _gains(
    judged: Judged, vocabulary: Vocabulary, sequences: Sequences, targets: Targets, asked: Int64
) -> tuple[Float64, Float64]:
    """NDCG@10 of every target by both heads; an item this version lacks is a miss. `asked` are rows of
    `vocabulary`, the target's first."""
    own = judged.vocabulary
    histories = histories_before(sequences, own, judged.max_history)
    at = Targets.draw(sequences, targets.positions, own, limit=len(targets.positions), seed=0)
    items = vocabulary.items_at(np.maximum(asked, 1))
    items[:, 0] = sequences.items[targets.positions]
    candidates = own.item_rows_of(items).astype(np.int64)
    full = full_catalogue(judged.scorer, histories, at, len(own.item_ids))
    among = among_candidates(judged.scorer, histories, at, own, candidates)
    return ndcg_gains(full, _CUT), ndcg_gains(among, _CUT)
