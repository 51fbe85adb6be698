"""The tiers of users, looked up where a request says no more than whose it is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final, Protocol

from features.store import StoreUnavailable
from inference.admission.tiers import Tiers

log = logging.getLogger(__name__)

# In one round trip to the store.
READ_AT_ONCE: Final = 512
# What was known before, or the default tier, holds for so long where the store did not answer.
UNANSWERED_S: Final = 1.0


class TierStore(Protocol):
    """What knows tiers by name; every `features.store.FeatureStore` does."""

    async def tiers(self, user_ids: Sequence[int]) -> list[str | None]: ...


class UserTiers:
    """Codes of tiers, remembered for `ttl_s` of at most `kept` users. Without a store all have the
    default one; while a store is away users have the one that they had, or the default one."""

    def __init__(
        self,
        store: TierStore | None,
        tiers: Tiers,
        *,
        ttl_s: float,
        kept: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store if len(tiers) > 1 else None
        self._tiers = tiers
        self._ttl_s = ttl_s
        self._kept = kept
        self._clock = clock
        # user -> code, and until when that is believed; the oldest first
        self._known: dict[int, tuple[int, float]] = {}
        self._wanted: set[int] = set()
        self._reading: asyncio.Task[None] | None = None

    @property
    def any_known(self) -> bool:
        """Whether anybody can have another tier than the default one."""
        return self._store is not None

    async def codes(self, users: Sequence[int]) -> list[int]:
        """The code of each user's tier. Waits for the store only for those who are not known; who asks
        in the same turn of the loop shares a round trip."""
        if self._store is None:
            return [self._tiers.default] * len(users)
        known, now_s = self._known, self._clock()
        try:
            found = [known[user] for user in users]
            if all(until_s > now_s for _, until_s in found):
                return [code for code, _ in found]
        except KeyError:
            pass
        await self._learn({user for user in users if user not in known or known[user][1] <= now_s})
        default = (self._tiers.default, 0.0)
        return [known.get(user, default)[0] for user in users]

    async def _learn(self, users: set[int]) -> None:
        self._wanted |= users
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        # One who gives up does not take the answer from the others.
        await asyncio.shield(self._reading)

    async def _read(self) -> None:
        users, self._wanted, self._reading = list(self._wanted), set(), None
        for start in range(0, len(users), READ_AT_ONCE):
            part = users[start : start + READ_AT_ONCE]
            try:
                assert self._store is not None
                codes = [self._tiers.code(name) for name in await self._store.tiers(part)]
                until_s = self._clock() + self._ttl_s
            except StoreUnavailable as error:
                log.info("Tiers are not known: %s", error)
                codes = [self._known.get(user, (self._tiers.default, 0.0))[0] for user in part]
                until_s = self._clock() + min(self._ttl_s, UNANSWERED_S)
            self._remember(part, codes, until_s)

    def _remember(self, users: Sequence[int], codes: Sequence[int], until_s: float) -> None:
        known = self._known
        for user, code in zip(users, codes, strict=True):
            known.pop(user, None)
            known[user] = code, until_s
        for user in list(islice(known, max(0, len(known) - self._kept))):
            del known[user]
