"""Who gets the canary's lists: a hash of the user's id, salted with the canary's version.

A user is in the same arm on every worker, after every restart and in every replay; another canary
draws other users.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

STEPS: Final = 10_000  # a hundredth of a percent each

UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Split:
    """A share of all users, in hundredths of a percent."""

    share: int
    salt: np.uint64

    @classmethod
    def of(cls, version: str, percent: float) -> Self:
        digest = hashlib.blake2b(version.encode(), digest_size=8).digest()
        return cls(round(percent * STEPS / 100), np.frombuffer(digest, "<u8")[0])

    def chosen(self, user_ids: Iterable[int], count: int) -> npt.NDArray[np.bool_]:
        """bool [count]: which users are in the share. A larger share holds every smaller one."""
        users = np.fromiter(user_ids, np.uint64, count)
        return _buckets(users, self.salt) < self.share


def _buckets(users: UInt64, salt: np.uint64) -> UInt64:
    """uint64 in 0 … STEPS - 1, evenly spread: the finaliser of SplitMix64, scaled down."""
    mixed = (users ^ salt) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return ((mixed >> np.uint64(32)) * np.uint64(STEPS)) >> np.uint64(32)
