"""The contract of the feature store. `redis_store` is the real one, `memory_store` its twin.

One suite (`tests/features/test_store.py`) runs on both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt


class StoreUnavailable(ConnectionError):
    """The store did not answer in time, or its breaker is open. Nothing is known of the write:
    repeating the same append is safe, because the fence makes it count once."""


class Append(NamedTuple):
    """One accepted click on its way into its user's sequence, with its place in the log."""

    user_id: int
    item_id: int
    category_id: int
    behavior: int  # position in topics.messages.BEHAVIORS
    timestamp: int  # Unix seconds
    epoch: int  # u32 made from the topic's id: a recreated topic starts its offsets anew
    partition: int
    offset: int


class Appended(NamedTuple):
    """The user's packed sequence just after one append. `applied` is False where the fence had
    already seen that offset: the sequence is then as it stands now, and nothing changed. `tier` as in
    `User`."""

    applied: bool
    sequence: bytes
    tier: str | None = None


class User(NamedTuple):
    """What the store has of a user: the packed sequence, None without history; the name of the service
    tier, None for the default one."""

    sequence: bytes | None
    tier: str | None


class Neighbours(NamedTuple):
    """Items with a weight each, heaviest first: ids int64 [n], log2_weights float64 [n].

    The store keeps logarithms, so that a weight which decays with time needs no rescaling however
    far event time moves (`features.statistics` says how).
    """

    items: npt.NDArray[np.int64]
    log2_weights: npt.NDArray[np.float64]


def log2_add(a: float, b: float) -> float:
    """log2(2ᵃ + 2ᵇ), however large a and b are."""
    high, low = (a, b) if a >= b else (b, a)
    return high + math.log2(1.0 + 2.0 ** (low - high))


class FeatureStore(Protocol):
    """Sequences and item statistics. Every call is one round trip, whatever the batch size."""

    async def append(
        self, appends: Sequence[Append], *, neighbours: Sequence[str] = (), limit: int = 50
    ) -> tuple[list[Appended], list[Neighbours]]:
        """Apply in the order given; each answer is the sequence just after its own append.

        `neighbours` are statistics (named by `features.keys`) read in the same round trip.
        `StoreUnavailable` may leave some users' events applied and others not, never a later event
        of a user without the earlier ones: repeat the same batch until it succeeds, and go no
        further in those partitions meanwhile.
        """
        ...

    async def read(self, user_ids: Sequence[int]) -> list[User]:
        """What is kept of users, in the order asked for."""
        ...

    async def tiers(self, user_ids: Sequence[int]) -> list[str | None]:
        """The tiers of users alone, as in `User`, in the order asked for."""
        ...

    async def set_tier(self, user_id: int, tier: str | None) -> None:
        """Put a user into a tier, until told otherwise; None takes the user out of any."""
        ...

    async def neighbours(self, names: Sequence[str], limit: int) -> list[Neighbours]:
        """The heaviest members of several statistics, by name (`features.keys`)."""
        ...

    async def increment(self, increments: Mapping[str, Mapping[int, float]]) -> None:
        """Add to the weights of members of statistics, each bounded in size, in one round trip.

        An increment is log2 of what is added. Not safe to repeat: a repeated one counts twice.
        """
        ...

    async def ping(self) -> None:
        """Raise `StoreUnavailable` unless the store answers."""
        ...

    async def close(self) -> None: ...
