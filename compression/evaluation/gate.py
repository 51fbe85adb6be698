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

from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from compression.evaluation.comparison import HEADS, both_heads, compared
from compression.evaluation.probes import CANDIDATES, USERS, candidates_of, histories_of, times_ms
from compression.evaluation.targets import Targets
from compression.evaluation.verdict import Check, GateLimits, Judged, Verdict
from compression.logs.dataset import Sequences, Split
from compression.releases.registry import ITEM_TABLE, Artefact, read_item_table
from compression.training.warm_start import TEACHER
from features.encoding import Vocabulary

_RECENT_SHARE: Final = 0.1  # of a log's events, by time

Int64 = npt.NDArray[np.int64]


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
        return [Check(name=f"{head} accuracy", outcome="skipped", detail=why) for head in HEADS]
    return [
        compared(f"{head} accuracy", "serving", *gains, limits.margin, limits, seed, sure=True)
        for head, gains in both_heads(candidate, serving, sequences, split, targets, seed)
    ]


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
            compared(f"{head} kept", "teacher", *gains, limits.teacher_loss, limits, seed, sure=False)
            for head, gains in both_heads(candidate, teacher, sequences, split, targets, seed)
        ]
    ours_bytes, their_bytes = _served_bytes(folder), _served_bytes(their_folder)
    ours_ms, their_ms = times_ms((candidate, teacher), sequences, targets.positions)
    gained = ours_bytes < their_bytes or ours_ms < their_ms
    checks.append(
        Check(
            name="gain",
            outcome="passed" if gained else "refused",
            value=round(ours_ms / their_ms, 4),
            limit=1.0,
            detail=f"{ours_bytes / 1e6:.1f} of {their_bytes / 1e6:.1f} MB, {ours_ms:.2f} of {their_ms:.2f} ms"
            f" for {USERS} users × {CANDIDATES} candidates"
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


# Limits --------------------------------------------------------------------------------------------


def finite(candidate: Judged, folder: Path, sequences: Sequences, positions: Int64) -> Check:
    """No NaN and no infinity: in the item table, and in answers for somebody unknown and for real users."""
    table = read_item_table((folder / ITEM_TABLE).read_bytes())
    bad = int((~np.isfinite(table)).sum())
    histories = histories_of(candidate, sequences, positions)
    answers = [
        candidate.scorer.user_vectors(histories),
        candidate.scorer.rank(histories, *candidates_of(candidate)),
    ]
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
    (median,) = times_ms([candidate], sequences, positions)
    return Check(
        name="latency",
        outcome="refused" if median > limits.latency_ms else "passed",
        value=round(median, 2),
        limit=limits.latency_ms,
        detail=f"{median:.1f} ms for {USERS} users × {CANDIDATES} candidates, "
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
