"""What a version must show before it is published.

Accuracy is compared user by user with the version that serves: NDCG@10 of both on the same events, the
difference resampled over users (a user's events stand or fall together). Refused is what is worse by more
than a margin with confidence; a small log proves little, and then nothing is refused for it. A network that
was compressed is compared with itself before, in the same way, and there the mean itself must not fall by
more than its limit: no doubt is to its advantage. The rest are limits: no number that is not finite, how long
the exported graph takes, how large the files are, and how much of what people click on, and of what was
served before, the version knows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from compression.evaluation.evaluate import (
    Targets,
    among_candidates,
    draw_candidates,
    full_catalogue,
    histories_before,
    ndcg_gains,
)
from compression.evaluation.predictors import Statistics
from compression.evaluation.scoring import Scorer
from compression.logs.dataset import Sequences, Split
from compression.releases.registry import ITEM_TABLE, Artefact, read_item_table
from compression.training.warm_start import TEACHER
from features.encoding import HistoryArrays, Vocabulary

RESAMPLES: Final = 2_000
_CUT: Final = 10
_RECENT_SHARE: Final = 0.1  # of a log's events, by time
_TIMED_USERS, _TIMED_CANDIDATES, _TIMED_RUNS = 32, 50, 30
_CELLS: Final = 4_000_000  # weights of users held at once

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Outcome = Literal["passed", "refused", "skipped"]


class GateLimits(BaseSettings):
    """GATE_… in the environment. `margin` is a share of the serving version's NDCG@10, `teacher_loss` of
    that of the network before it was compressed."""

    model_config = SettingsConfigDict(env_prefix="GATE_", frozen=True, extra="ignore")

    margin: Annotated[float, Field(ge=0, le=1)] = 0.02
    teacher_loss: Annotated[float, Field(ge=0, le=1)] = 0.01
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    targets: Annotated[int, Field(ge=1)] = 2_000
    latency_ms: Annotated[float, Field(gt=0)] = 50.0
    max_bytes: Annotated[int, Field(ge=1)] = 2 * 2**30
    recent_known: Annotated[float, Field(ge=0, le=1)] = 0.8
    served_known: Annotated[float, Field(ge=0, le=1)] = 0.5


class Check(BaseModel):
    """One thing that was looked at: a figure, what it was held against, and a sentence."""

    model_config = ConfigDict(frozen=True)

    name: str
    outcome: Outcome
    value: float | None = None
    limit: float | None = None
    detail: str
    figures: dict[str, float] = {}


class Verdict(BaseModel):
    """All checks. `forced`: it was published although a check refused."""

    model_config = ConfigDict(frozen=True)

    against: str | None
    checks: list[Check]
    forced: bool = False

    @property
    def passed(self) -> bool:
        return not self.refusals

    @property
    def refusals(self) -> list[str]:
        return [f"{check.name}: {check.detail}" for check in self.checks if check.outcome == "refused"]


class GateRefused(RuntimeError):
    """The version is not published; the message says for which reasons."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__("the gate refuses this version: " + "; ".join(verdict.refusals))
        self.verdict = verdict


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """A version with what is needed to ask it about a log."""

    scorer: Scorer
    vocabulary: Vocabulary
    max_history: int


def judge(
    candidate: Judged,
    folder: Path,
    serving: tuple[Artefact, Judged] | None,
    sequences: Sequences,
    split: Split,
    limits: GateLimits,
    *,
    teacher: tuple[Path, Judged] | None = None,
    seed: int = 7,
) -> Verdict:
    """Every check of the version whose files lie in `folder`; with a `teacher`, whose files lie in a folder,
    too, that nothing but size and time was lost in compressing it."""
    targets = Targets.draw(sequences, split.test, candidate.vocabulary, limit=limits.targets, seed=seed)
    checks = [finite(candidate, folder, sequences, targets.positions)]
    if checks[0].outcome == "passed":
        checks += accuracy(candidate, serving and serving[1], sequences, split, targets, limits, seed=seed)
        checks.append(latency(candidate, sequences, targets.positions, limits))
        if teacher is not None:
            checks += _against_teacher(
                candidate, folder, teacher[1], teacher[0], sequences, split, targets, limits, seed
            )
    checks.append(size(folder, limits))
    checks += coverage(candidate.vocabulary, serving and serving[1].vocabulary, sequences, limits)
    return Verdict(against=serving[0].version if serving else None, checks=checks)


# Accuracy ------------------------------------------------------------------------------------------


def accuracy(
    candidate: Judged,
    serving: Judged | None,
    sequences: Sequences,
    split: Split,
    targets: Targets,
    limits: GateLimits,
    *,
    seed: int,
) -> list[Check]:
    """Retrieval over the full catalogue and ranking among fifty, each beside the serving version's."""
    if serving is None or not len(targets.positions):
        why = "no version serves yet" if serving is None else "no user has enough events to judge by"
        return [Check(name=f"{head} accuracy", outcome="skipped", detail=why) for head in _HEADS]
    return [
        _compared(f"{head} accuracy", "serving", *gains, limits.margin, limits, seed, sure=True)
        for head, gains in _both(candidate, serving, sequences, split, targets, seed)
    ]


_HEADS: Final = ("retrieval", "ranking")
_Gains = tuple[Float64, Float64, Int64]  # ours, theirs, and whose


def _both(
    candidate: Judged, other: Judged, sequences: Sequences, split: Split, targets: Targets, seed: int
) -> Iterator[tuple[str, _Gains]]:
    statistics = Statistics(sequences, split, candidate.vocabulary)
    asked = draw_candidates(sequences, targets, statistics, candidate.vocabulary, seed=seed)
    ours = _gains(candidate, candidate.vocabulary, sequences, targets, asked)
    theirs = _gains(other, candidate.vocabulary, sequences, targets, asked)
    users = sequences.user_of(targets.positions)
    for head, mine, other_gains in zip(_HEADS, ours, theirs, strict=True):
        yield head, (mine, other_gains, users)


def _compared(
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
    """`sure`: refused is what is worse by more than the margin with confidence, not only on average."""
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


# Compression ---------------------------------------------------------------------------------------


def _against_teacher(
    candidate: Judged,
    folder: Path,
    teacher: Judged,
    their_folder: Path,
    sequences: Sequences,
    split: Split,
    targets: Targets,
    limits: GateLimits,
    seed: int,
) -> list[Check]:
    """Both heads beside the network before it was compressed, and what the compression has gained."""
    checks = []
    if len(targets.positions):
        checks = [
            _compared(f"{head} kept", "teacher", *gains, limits.teacher_loss, limits, seed, sure=False)
            for head, gains in _both(candidate, teacher, sequences, split, targets, seed)
        ]
    ours_bytes, their_bytes = _served_bytes(folder), _served_bytes(their_folder)
    ours_ms, their_ms = _interleaved_ms((candidate, teacher), sequences, targets.positions)
    gained = ours_bytes < their_bytes or ours_ms < their_ms
    checks.append(
        Check(
            name="gain",
            outcome="passed" if gained else "refused",
            value=round(ours_ms / their_ms, 4),
            limit=1.0,
            detail=f"{ours_bytes / 1e6:.1f} of {their_bytes / 1e6:.1f} MB, {ours_ms:.2f} of {their_ms:.2f} ms"
            f" for {_TIMED_USERS} users × {_TIMED_CANDIDATES} candidates"
            + ("" if gained else ": neither smaller nor faster than what it was made of"),
            figures={
                "bytes": float(ours_bytes),
                "teacher_bytes": float(their_bytes),
                "ms": round(ours_ms, 3),
                "teacher_ms": round(their_ms, 3),
            },
        )
    )
    return checks


def _served_bytes(folder: Path) -> int:
    """Of the files that are served."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != TEACHER)


def _interleaved_ms(judged: Sequence[Judged], sequences: Sequences, positions: Int64) -> list[float]:
    """Medians of turns that alternate, so that what else the machine does meets all alike."""
    asked = [(one.scorer, _some_histories(one, sequences, positions), _asked(one)) for one in judged]
    took_ms = np.empty((_TIMED_RUNS, len(asked)))
    for turn in range(_TIMED_RUNS):
        for place, (scorer, histories, candidates) in enumerate(asked):
            began_s = time.perf_counter()
            scorer.rank(histories, *candidates)
            took_ms[turn, place] = 1000 * (time.perf_counter() - began_s)
    return [float(median) for median in np.median(took_ms, axis=0)]


# Limits --------------------------------------------------------------------------------------------


def finite(candidate: Judged, folder: Path, sequences: Sequences, positions: Int64) -> Check:
    """No NaN and no infinity: in the item table, and in answers for somebody unknown and for real users."""
    table = read_item_table((folder / ITEM_TABLE).read_bytes())
    bad = int((~np.isfinite(table)).sum())
    histories = _some_histories(candidate, sequences, positions)
    answers = [candidate.scorer.user_vectors(histories), candidate.scorer.rank(histories, *_asked(candidate))]
    bad += sum(int((~np.isfinite(answer)).sum()) for answer in answers)
    return Check(
        name="finite",
        outcome="refused" if bad else "passed",
        value=float(bad),
        limit=0.0,
        detail=f"{bad:,} numbers that are not finite" if bad else "every number is finite",
    )


def latency(candidate: Judged, sequences: Sequences, positions: Int64, limits: GateLimits) -> Check:
    """The exported ranking graph for 32 users with 50 candidates each: the median of some runs."""
    histories, asked = _some_histories(candidate, sequences, positions), _asked(candidate)
    took_ms = []
    for _ in range(_TIMED_RUNS):
        began_s = time.perf_counter()
        candidate.scorer.rank(histories, *asked)
        took_ms.append(1000 * (time.perf_counter() - began_s))
    median = float(np.median(took_ms))
    return Check(
        name="latency",
        outcome="refused" if median > limits.latency_ms else "passed",
        value=round(median, 2),
        limit=limits.latency_ms,
        detail=f"{median:.1f} ms for {_TIMED_USERS} users × {_TIMED_CANDIDATES} candidates, "
        f"at most {limits.latency_ms:g} ms",
    )


def size(folder: Path, limits: GateLimits) -> Check:
    """All files of the version together."""
    total = sum(path.stat().st_size for path in folder.iterdir())
    return Check(
        name="size",
        outcome="refused" if total > limits.max_bytes else "passed",
        value=float(total),
        limit=float(limits.max_bytes),
        detail=f"{total / 1e6:.1f} MB, at most {limits.max_bytes / 1e6:.1f} MB",
    )


def coverage(
    vocabulary: Vocabulary, serving: Vocabulary | None, sequences: Sequences, limits: GateLimits
) -> list[Check]:
    """The share of the log's latest events whose items are known, and of the items served before."""
    from_s = np.quantile(sequences.timestamps, 1 - _RECENT_SHARE)
    recent = sequences.items[sequences.timestamps >= from_s]
    checks = [_share("recent items", float(vocabulary.is_known(recent).mean()), limits.recent_known)]
    if serving is None or not len(serving.item_ids):
        return [*checks, Check(name="catalogue", outcome="skipped", detail="no version serves yet")]
    kept = float(vocabulary.is_known(serving.item_ids).mean())
    return [*checks, _share("catalogue", kept, limits.served_known)]


def _share(name: str, share: float, limit: float) -> Check:
    of = "the latest clicks" if name == "recent items" else "the items served before"
    return Check(
        name=name,
        outcome="refused" if share < limit else "passed",
        value=round(share, 5),
        limit=limit,
        detail=f"{share:.1%} of {of} known, at least {limit:.0%}",
    )


def _some_histories(candidate: Judged, sequences: Sequences, positions: Int64) -> HistoryArrays:
    """32 users of the log, each before an event to be predicted, repeated where there are fewer; the
    first has no history."""
    if not len(positions):
        positions = np.arange(len(sequences))
    chosen = np.resize(positions, _TIMED_USERS)
    found = histories_before(sequences, candidate.vocabulary, candidate.max_history)(chosen)
    columns: dict[str, Any] = dict(found.tensors())
    for column in columns.values():
        column[0] = 0
    return HistoryArrays(**columns)


def _asked(candidate: Judged) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Candidates and their categories, int32 [32, 50], the same every time."""
    known = max(1, len(candidate.vocabulary.item_ids))
    rows = 1 + np.random.default_rng(3).integers(0, known, (_TIMED_USERS, _TIMED_CANDIDATES))
    of_row = np.concatenate([[0], candidate.vocabulary.item_categories])
    return rows.astype(np.int32), of_row[np.minimum(rows, len(of_row) - 1)].astype(np.int32)
