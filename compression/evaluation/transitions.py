"""Smoothed multi-distance transition counts: a predictor that is counted, not trained.

After Petrov and others, "Pairwise-count transition model" (PCTM, RecSys 2026). With N_d(b, a) the number
of times item a came d events after item b, I the number of items and history b_0, b_1, … newest first::

    C(b, a)  = sum over d = 1..W of d^-p · N_d(b, a)
    score(a) = sum over j of w_j · log(1 + C(b_j, a) · I / tau) + boost · log P(a)
               + walk · log(1 + H(a) · I / walk_tau)
               + neighbours · score of `neighbours.py` + trend · log((l_a + 30 · m) / (n_a + 30))

The last two lines and `recency` are not theirs. `recency` r counts an arrival at a as max(0.2, r^(events of
its user that were counted after it)), not as one: what will be asked for lies at the ends. H is where a walk
of two steps ends that starts at b_j with chance w_j and steps by C + C^T, every row made to sum to one
(random walks for recommending: Cooper and others, WWW 2014): it reaches items that never met. l_a is how
many of item a's n_a events are among the last three of their users, m the mean share: what comes into
fashion, of rare items with caution.

The kernel w sums to one. `tail`: the newest `head` events share `recent_mass` in proportion to
decay^j, all older ones share the rest evenly; where there are no older ones the newest have it all.
P(a) = (n_a + 1) / (sum of n + I) is how often a occurs; a negative boost favours the rare.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from compression.evaluation.neighbours import Neighbours

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TransitionSettings:
    """The knobs of the formula. `head` None: the kernel is decay^j over the whole history."""

    window: int = 20
    distance_power: float = 1.0
    tau: float = 150.0
    decay: float = 0.8
    head: int | None = 7
    recent_mass: float = 0.8
    boost: float = -0.4
    max_history: int = 200
    recency: float = 1.0
    walk: float = 0.0
    walk_tau: float = 5.0
    neighbours: float = 0.0
    trend: float = 0.0

    def kernel(self, length: int) -> Float32:
        """[length] weights, newest event first; they sum to one."""
        ages = np.arange(length, dtype=np.float64)
        if self.head is None:
            weights = self.decay**ages
        else:
            weights = np.zeros(length)
            recent = self.decay ** ages[: self.head]
            weights[: self.head] = self.recent_mass * recent / recent.sum()
            if length > self.head:
                weights[self.head :] = (1.0 - self.recent_mass) / (length - self.head)
        return np.asarray(weights / weights.sum(), np.float32)


# As published: MovieLens-1M, and Amazon Beauty.
DENSE: Final = TransitionSettings(decay=0.6)
SPARSE: Final = TransitionSettings(
    window=10, distance_power=0.5, tau=11_250.0, decay=0.6, head=None, boost=-0.04, max_history=50
)
PUBLISHED: Final = {"dense": DENSE, "sparse": SPARSE}
# The latter with recency and walks, chosen on Amazon Beauty's validation items.
WALKED: Final = replace(SPARSE, recency=0.92, walk=0.12)
# With all there is, chosen there in fusion with networks: fitted without a user's last three, asked for the
# last but one.
COMBINED: Final = replace(SPARSE, distance_power=0.75, boost=-0.07, walk=0.125, neighbours=0.12, trend=0.67)
COUNTS: Final = PUBLISHED | {"walked": WALKED, "combined": COMBINED}
_LEAST_RECENCY: Final = 0.2
_NEWEST: Final = 3
_CAUTION: Final = 30.0


class TransitionCounts:
    """The counts of a log, and the scores they give."""

    def __init__(self, rows: Int64, users: Int64, catalogue: int, settings: TransitionSettings) -> None:
        """`rows` [n] are the events to count, items as rows 1 to `catalogue`, 0 where unknown; `users` [n]
        whose they are. A user's events are adjacent, oldest first."""
        self.settings = settings
        self.catalogue = catalogue
        counts = pair_counts(rows, users, catalogue, settings)
        self._steps = _chances(counts + counts.T) if settings.walk else None
        counts.data = np.log1p(counts.data * np.float32(catalogue / settings.tau))
        self._evidence = counts
        often = np.bincount(rows[rows > 0], minlength=catalogue + 1).astype(np.float64)
        prior = settings.boost * np.log((often + 1) / (often.sum() + catalogue))
        if settings.trend:
            late = np.bincount(rows[(events_after(users) < _NEWEST) & (rows > 0)], minlength=catalogue + 1)
            mean = late.sum() / max(1.0, often.sum())
            prior += settings.trend * np.log((late + _CAUTION * mean + 1e-9) / (often + _CAUTION))
        self._prior = prior.astype(np.float32)
        self._neighbours = Neighbours(rows, users, catalogue) if settings.neighbours else None

    def scores(self, histories: Iterator[Int64] | list[Int64], askers: Int64 | None = None) -> Float32:
        """[B, catalogue] scores of the items at rows 1 to `catalogue` after histories of rows, each oldest
        first. `askers` [B]: whose they are, of the users counted; nobody is a neighbour of himself."""
        from scipy import sparse

        newest = [history[::-1][: self.settings.max_history] for history in histories]
        lengths = np.array([len(history) for history in newest])
        kernels = {length: self.settings.kernel(length) for length in np.unique(lengths).tolist() if length}
        weights = [kernels[length] for length in lengths.tolist() if length]
        asked: Any = sparse.csr_matrix(
            (
                np.concatenate([*weights, np.empty(0, np.float32)]),
                np.concatenate([*newest, np.empty(0, np.int64)]),
                np.append(0, np.cumsum(lengths)),
            ),
            shape=(len(newest), self.catalogue + 1),
        )
        evidence: Float32 = (asked @ self._evidence).toarray()
        if self._steps is not None:
            reached = asked @ self._steps @ self._steps
            reached.data = np.log1p(reached.data * np.float32(self.catalogue / self.settings.walk_tau))
            evidence += (reached * np.float32(self.settings.walk)).toarray()
        if self._neighbours is not None:
            evidence += np.float32(self.settings.neighbours) * self._neighbours.scores(newest, askers)
        return np.asarray((evidence + self._prior)[:, 1:], np.float32)


def pair_counts(rows: Int64, users: Int64, catalogue: int, settings: TransitionSettings) -> Any:
    """C, a sparse matrix [catalogue + 1, catalogue + 1] by rows of items; row and column 0 are empty."""
    from scipy import sparse

    size = catalogue + 1
    counted = np.ones(len(rows), np.float32)
    if settings.recency < 1.0:
        after = events_after(users)
        counted = np.maximum(_LEAST_RECENCY, settings.recency**after).astype(np.float32)
    counts: Any = sparse.csr_matrix((size, size), dtype=np.float32)
    for distance in range(1, min(settings.window, len(rows) - 1) + 1):
        pairs = (users[:-distance] == users[distance:]) & (rows[:-distance] > 0) & (rows[distance:] > 0)
        weight = counted[distance:][pairs] * np.float32(distance**-settings.distance_power)
        places = rows[:-distance][pairs], rows[distance:][pairs]
        counts = counts + sparse.coo_matrix((weight, places), shape=(size, size)).tocsr()
    return counts


def events_after(users: Int64) -> Int64:
    """[n] for each event, how many of its user come after it; a user's events are adjacent."""
    last = np.append(np.flatnonzero(users[1:] != users[:-1]), len(users) - 1)
    at = np.arange(len(users))
    return np.asarray(last[np.searchsorted(last, at)] - at, np.int64)


def _chances(weights: Any) -> Any:
    """Rows of a sparse matrix that sum to one, or to zero where they are empty."""
    from scipy import sparse

    sums = np.asarray(weights.sum(1), np.float32).ravel()
    return (sparse.diags_array(1 / np.where(sums > 0, sums, 1)) @ weights).tocsr()
