"""Every Redis key: its name, its bound and its lifetime. Names are made here and nowhere else.

Each key carries one hash tag, so a script touches one slot of a Redis Cluster. Names are short
because a user's whole sequence has 1.5 KiB to live in, key included.

    s:{user}       string      the packed behaviour sequence (`features.sequence`)
    q:{user}       string      the name of the user's service tier; no key, no lifetime: the default tier
    t:{item}       sorted set  what users did right after this item: item to log2 weight
    c:{category}   sorted set  the popular items of a category: item to log2 weight
    p:{all}        sorted set  the popular items of all: item to log2 weight
    a:{tier/…}     string      what a tier has used of its rate, in two windows (`inference.admission`)
    l:{alias}      string      the token of the process that retrains the alias; ends with its lease
    n:{alias}      string      the highest token so far; no lifetime

Members of the sorted sets are item ids of 8 bytes, little-endian (shorter than digits, and exact
past 2⁵³).
"""

from __future__ import annotations

from typing import Final, NamedTuple

DAY_S: Final = 24 * 3600

SEQUENCE_TTL_S: Final = 30 * DAY_S
SEQUENCE_MAX_AGE_S: Final = 30 * DAY_S


class Bound(NamedTuple):
    """A statistic keeps its `members` heaviest and disappears `ttl_s` after its last increment."""

    members: int
    ttl_s: int


_TRANSITIONS: Final = Bound(members=64, ttl_s=30 * DAY_S)
_CATEGORY: Final = Bound(members=256, ttl_s=30 * DAY_S)
_POPULAR: Final = Bound(members=4096, ttl_s=30 * DAY_S)

POPULAR: Final = "p:{all}"
TIER_USE_PREFIX: Final = "a"
TIER_USE_NAMESPACE: Final = "tier"
"""The rest of those names is made by the library `limits`, in braces: one slot per tier."""


def sequence(user_id: int) -> str:
    """The behaviour sequence of a user."""
    return f"s:{{{user_id}}}"


def tier(user_id: int) -> str:
    """The service tier of a user, in the slot of the sequence: both are read in one go."""
    return f"q:{{{user_id}}}"


def transitions(item_id: int) -> str:
    """The statistic of what follows an item."""
    return f"t:{{{item_id}}}"


def category(category_id: int) -> str:
    """The statistic of what is popular in a category."""
    return f"c:{{{category_id}}}"


def retraining_lease(alias: str) -> str:
    """Who retrains a release alias (`infra.retraining.lease`)."""
    return f"l:{{{alias}}}"


def retraining_token(alias: str) -> str:
    """The highest token that a retraining of the alias was given."""
    return f"n:{{{alias}}}"


def bound(name: str) -> Bound:
    """The bound of a statistic, by its name.

    >>> bound(transitions(7)).members
    64
    """
    if name.startswith("t:"):
        return _TRANSITIONS
    return _CATEGORY if name.startswith("c:") else _POPULAR
