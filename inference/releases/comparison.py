"""Two versions' answers to the same requests, side by side: what differs, and what must not be."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from inference.errors import DeadlineExceeded, InferenceError, Overloaded
from inference.types import RankedList, RankRequest

# Said about the machine, not about the version.
BUSY = (Overloaded, DeadlineExceeded)


class Sample(NamedTuple):
    """A live request and the list that was sent."""

    request: RankRequest
    sent: RankedList


class Difference(NamedTuple):
    """Between two lists of one request. `correlation` is Spearman's of the places of common items, NaN
    where fewer than three are common or all tie."""

    overlap: float  # common items, as a share of the longer list
    correlation: float
    score: float  # largest difference of a common item's scores, NaN without one


@dataclass(slots=True)
class Comparison:
    """Sums over many pairs of lists."""

    compared: int = 0
    failed: int = 0
    busy: int = 0
    short: int = 0
    seconds: list[float] = field(default_factory=list)
    _overlap: float = 0.0
    _correlation: float = 0.0
    _correlated: int = 0
    _score: float = 0.0
    reason: str = ""

    def add(
        self, samples: Sequence[Sample], answers: Sequence[RankedList | InferenceError], took_s: float
    ) -> None:
        """What a version answered to sampled requests, one batch of them."""
        self.seconds = [*self.seconds[-255:], took_s]
        for sample, answer in zip(samples, answers, strict=True):
            if isinstance(answer, BUSY):
                self.busy += 1
            elif isinstance(answer, InferenceError):
                self.failed += 1
                self.reason = str(answer)
            else:
                self._compare(sample, answer)

    def _compare(self, sample: Sample, answer: RankedList) -> None:
        full = len(sample.sent.items) == sample.request.k
        if not np.isfinite(answer.scores).all():
            self.failed += 1
            self.reason = "scores that are not finite"
            return
        # Versions may know different items; a list that was full has to be full again.
        if len(answer.items) > sample.request.k or (full and len(answer.items) < sample.request.k):
            self.short += 1
            self.reason = f"{len(answer.items)} items where {sample.request.k} were asked for"
        found = difference(sample.sent, answer)
        self.compared += 1
        self._overlap += found.overlap
        if np.isfinite(found.correlation):
            self._correlation += found.correlation
            self._correlated += 1
        if np.isfinite(found.score):
            self._score = max(self._score, found.score)

    @property
    def overlap(self) -> float:
        return self._overlap / self.compared if self.compared else float("nan")

    def median_s(self) -> float:
        # The standard library's: numpy's own imports more of numpy at its first call, on the event loop.
        return statistics.median(self.seconds) if self.seconds else 0.0

    def figures(self) -> dict[str, float | int | None]:
        """For people and probes; None where nothing has been compared."""
        return {
            "compared": self.compared,
            "failed": self.failed,
            "short": self.short,
            "dropped": self.busy,
            "overlap": round(self.overlap, 4) if self.compared else None,
            "rank_correlation": round(self._correlation / self._correlated, 4) if self._correlated else None,
            "largest_score_difference": round(self._score, 6) if self.compared else None,
            "batch_ms": round(1e3 * self.median_s(), 3) if self.seconds else None,
        }


def difference(one: RankedList, other: RankedList) -> Difference:
    """How far two lists of one request are apart."""
    longest = max(len(one.items), len(other.items))
    if not longest:
        return Difference(1.0, float("nan"), float("nan"))
    items, ours, theirs = np.intersect1d(one.items, other.items, assume_unique=True, return_indices=True)
    if not len(items):
        return Difference(0.0, float("nan"), float("nan"))
    scores = np.abs(np.asarray(one.scores)[ours] - np.asarray(other.scores)[theirs])
    correlation = float("nan")
    if len(items) > 2:
        # Places have no ties, so Pearson's of their ranks is Spearman's.
        ranks = [places.argsort().argsort().astype(np.float64) for places in (ours, theirs)]
        left, right = (rank - rank.mean() for rank in ranks)
        correlation = float(left @ right / (left @ left))
    return Difference(len(items) / longest, correlation, float(scores.max()))
