"""What follows from a history beside its states, and from nothing else: known once, known again.

The items retrieved depend on the user vector alone, and the score of a candidate on the history and
the candidate alone, whatever stands beside it (`compression.training.model`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

_NO_ROW: Final = np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True, eq=False)
class Derived:
    """Per user, in order: vectors [users, dim]; the items retrieved and their scores [users, n], where
    has_retrieved [users]; the item rows [users, m] of the last list and their scores."""

    vectors: Float32
    items: Int64
    item_scores: Float32
    has_retrieved: Bool
    rows: Int32
    row_scores: Float32

    @classmethod
    def nothing(cls, users: int, dim: int, retrieved: int, listed: int) -> Derived:
        """Room for users of whom nothing is known."""
        return cls(
            np.zeros((users, dim), np.float32),
            np.zeros((users, retrieved), np.int64),
            np.zeros((users, retrieved), np.float32),
            np.zeros(users, np.bool_),
            np.full((users, listed), _NO_ROW, np.int32),
            np.zeros((users, listed), np.float32),
        )

    @property
    def listed(self) -> int:
        """How many scores there is room for, of a user."""
        return int(self.rows.shape[1])

    @property
    def user_bytes(self) -> int:
        """Memory of one user."""
        return sum(int(column.nbytes) for column in self._columns()) // max(1, len(self.vectors))

    def put(self, users: Int64, known: Derived, at: Sequence[int] | Int64) -> None:
        """Let users have what is known of others, at these places."""
        at = np.asarray(at)
        columns = list(zip(self._columns(), known._columns(), strict=True))
        if not known.has_retrieved[at].any():  # where candidates are named, nobody's
            columns = [
                pair for pair in columns if pair[0] is not self.items and pair[0] is not self.item_scores
            ]
        for column, theirs in columns:
            if column.size:
                column[users] = theirs.take(at, axis=0)

    def of(self, users: Sequence[int]) -> Derived:
        """What is known of some users, in this order, copied."""
        at = np.array(users)
        return Derived(*(column.take(at, axis=0) for column in self._columns()))

    def scores_of(self, rows: Int32, counts: Int64) -> tuple[Float32, Bool]:
        """Scores of the first `counts` [users] of item rows [users, width], and for which users all of
        them are known; the scores of others mean nothing."""
        width = min(rows.shape[1], self.rows.shape[1])
        if not width or (self.rows[:, 0] == _NO_ROW).all():
            return np.zeros(rows.shape, np.float32), np.zeros(len(rows), np.bool_)
        scores = np.zeros(rows.shape, np.float32)
        same = rows[:, :width, None] == self.rows[:, None]
        there = same.any(axis=2)
        if int(counts.min()) < width:
            there |= np.arange(width) >= counts[:, None]
        known: Bool = np.logical_and.reduce(there, axis=1)
        known &= counts <= width
        if known.any():
            scores[:, :width] = np.take_along_axis(self.row_scores, same.argmax(axis=2), 1)
        return scores, known

    def note_scores(self, users: Int64, rows: Int32, counts: Int64, scores: Float32) -> None:
        """Of some users, the first `counts` of item rows [users, width] and their scores, where they fit."""
        width = min(rows.shape[1], self.rows.shape[1])
        counts = counts[users]
        if len(counts) and int(counts.max()) > width:
            users, counts = users[counts <= width], counts[counts <= width]
        kept = rows[users, :width]
        if width and len(counts) and int(counts.min()) < width:
            kept[np.arange(width) >= counts[:, None]] = _NO_ROW
        if width < self.rows.shape[1]:
            self.rows[users] = _NO_ROW
        self.rows[users, :width] = kept
        self.row_scores[users, :width] = scores[users, :width]

    def _columns(self) -> tuple[npt.NDArray[Any], ...]:
        return (self.vectors, self.items, self.item_scores, self.has_retrieved, self.rows, self.row_scores)
