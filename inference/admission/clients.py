"""A token bucket for each user, thousands of users a call.

A bucket is one number: the moment at which it was, or will be, empty. Tokens are what has flowed in
since. A bucket that is full says nothing, so that forgetting it forgets nothing: users share a table of
fixed size, eight places to each of its rows, and a new one takes the fullest bucket's place.

The buckets are this process's own. A user's records have one partition per topic and a partition one
owner, so what a user gets in total is at most the rate once for clicks and once for requests, and one
more burst after a rebalance.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

_WAYS: Final = 8
_NOBODY: Final = -1
_LONG_AGO_S: Final = -1e200
_MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)


class ClientBuckets:
    """`kept` users, rounded up to a power of two: 16 bytes each."""

    def __init__(self, kept: int) -> None:
        rows = 1 << max(0, (kept - 1).bit_length() - 3)
        self._shift = np.uint64(65 - rows.bit_length())
        self._users = np.full((rows, _WAYS), _NOBODY, np.int64)
        self._empty_s = np.full((rows, _WAYS), _LONG_AGO_S)

    def tokens(self, users: Int64, rate: Float64, burst: Float64, now_s: float) -> Float64:
        """What each user has left, all [n]. Users who are not in the table have their whole burst."""
        rows = self._rows(users)
        # Whoever is in no place of the row gets the least of nothing: empty since ever, hence full.
        known = np.where(self._users[rows] == users[:, None], self._empty_s[rows], -np.inf)
        tokens: Float64 = np.minimum(burst, (now_s - known.max(axis=1)) * rate)
        return tokens

    def take(self, users: Int64, rate: Float64, burst: Float64, now_s: float) -> None:
        """One token for each place at which a user stands in `users`."""
        used_s = (places(users) + 1) / rate
        full_s = now_s - burst / rate
        while True:
            rows = self._rows(users)
            at, empty_s = self._users[rows] == users[:, None], self._empty_s[rows]
            # Before all time: the user's own place, where there is one, goes before the fullest.
            ways = np.where(at, -np.inf, empty_s).argmin(axis=1)
            known = np.where(at, empty_s, -np.inf).max(axis=1)
            self._users[rows, ways] = users
            # Of a user who comes several times the last is written, who has used the most.
            self._empty_s[rows, ways] = np.maximum(known, full_s) + used_s
            # New users of one row chose the same place: all but the last choose again.
            lost = self._users[rows, ways] != users
            if not lost.any():
                return
            users, used_s, full_s = users[lost], used_s[lost], full_s[lost]

    def _rows(self, users: Int64) -> Int64:
        if len(self._users) == 1:
            return np.zeros(len(users), np.int64)
        return ((users.view(np.uint64) * _MULTIPLIER) >> self._shift).astype(np.int64)


def places(groups: Int64) -> Int64:
    """How many of the same group stand before each element.

    >>> places(np.array([7, 5, 7, 7])).tolist()
    [0, 0, 1, 2]
    """
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    before = np.empty(len(groups), np.int64)
    before[order] = np.arange(len(groups)) - np.searchsorted(ordered, ordered)
    return before
