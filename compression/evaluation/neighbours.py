"""Users who had the same items: a source of evidence that is counted, not trained.

With n_i the number of events of item i, U the number of users and h_0, h_1, … a history, newest first::

    likeness(v) = sum over j with h_j among v's items of 0.8^j · log(U / (1 + n_(h_j))) / sqrt(1 + |v|)
    score(a)    = log(1 + 3 · sum over users v who had a of likeness(v))

|v| is how many events v has; repeats count. After user-based neighbourhood models (Herlocker and others,
SIGIR 1999), items that few had weighing more (Breese and others, UAI 1998).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

_DECAY: Final = 0.8
_SCALE: Final = 3.0

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


class Neighbours:
    """Who had what in a log, and the scores that gives."""

    def __init__(self, rows: Int64, users: Int64, catalogue: int) -> None:
        """`rows` [n] and `users` [n] as in `TransitionCounts`; row 0 is nothing."""
        from scipy import sparse

        known = rows > 0
        shape = (int(users.max(initial=0)) + 1, catalogue + 1)
        had: Any = sparse.csr_matrix(
            (np.ones(int(known.sum()), np.float32), (users[known], rows[known])), shape=shape
        )
        events: Float32 = np.asarray(had.sum(1), np.float32).ravel()
        often: Float32 = np.asarray(had.sum(0), np.float32).ravel()
        users_with_events = max(1.0, float((events > 0).sum()))
        self._rarity = np.log(users_with_events / (1.0 + often)).clip(min=0.0)
        self._had = had
        self._likeness = (had.T @ sparse.diags_array((1.0 + events) ** -0.5)).tocsr()

    def scores(self, newest: list[Int64], askers: Int64 | None = None) -> Float32:
        """[B, catalogue + 1] after histories, each newest first. `askers` [B]: users of the log who ask
        and are no neighbours of themselves."""
        from scipy import sparse

        lengths = np.array([len(history) for history in newest], np.int64)
        items = np.concatenate([*newest, np.empty(0, np.int64)])
        ages = np.arange(len(items)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        asked: Any = sparse.csr_matrix(
            (
                (_DECAY**ages * self._rarity[items]).astype(np.float32),
                items,
                np.append(0, np.cumsum(lengths)),
            ),
            shape=(len(newest), self._had.shape[1]),
        )
        alike = (asked @ self._likeness).tocsr()
        if askers is not None:
            alike.data[alike.indices == np.repeat(askers, np.diff(alike.indptr))] = 0.0
        shared: Float32 = (alike @ self._had).toarray()
        return np.asarray(np.log1p(np.float32(_SCALE) * shared), np.float32)
