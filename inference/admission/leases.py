"""A tier's tokens in this process, taken from the shared rate in slices.

A request never waits for Redis: it takes a token that is in hand or is refused. What was used is
taken anew every `lease_ms`, away from the requests, up to `lease_share` of the tier's burst. In any T
seconds, N processes together admit at most

    rate · T + burst + N · lease_share · burst

lists of the tier: what a token bucket would, and what they had in hand.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

import numpy as np
import numpy.typing as npt

from inference.admission.settings import AdmissionSettings, Tier

log = logging.getLogger(__name__)


class SharedRate(Protocol):
    """What all processes take from. `inference.admission.shared` has one in Redis."""

    async def take(self, tier: Tier, tokens: int) -> int:
        """Take at most that many and say how many it were. Raises nothing; takes a bounded time."""
        ...

    async def close(self) -> None: ...


class Leases:
    """Tokens in hand, float [tiers]; infinite for a tier without a shared rate."""

    def __init__(self, settings: AdmissionSettings, rate: SharedRate) -> None:
        self._rate = rate
        self.lease_s = settings.lease_ms / 1000
        self._limited = [(code, tier) for code, tier in enumerate(settings.tiers) if tier.rate is not None]
        self._most = [max(1, int(tier.most * settings.lease_share)) for _, tier in self._limited]
        self.tokens: npt.NDArray[np.float64] = np.full(len(settings.tiers), np.inf)
        for code, _ in self._limited:
            self.tokens[code] = 0.0

    @property
    def any_limit(self) -> bool:
        return bool(self._limited)

    def take(self, counts: npt.NDArray[np.int64]) -> None:
        """Use tokens, [tiers], at most those in hand."""
        self.tokens -= counts

    async def renew(self) -> None:
        """Fill up what was used since last time. Tiers that nobody used cost no call."""
        for (code, tier), most in zip(self._limited, self._most, strict=True):
            used = most - int(self.tokens[code])
            if used > 0:
                self.tokens[code] += await self._rate.take(tier, used)

    async def run(self) -> None:
        """Renew as long as the process lives."""
        while self.any_limit:
            await asyncio.sleep(self.lease_s)
            try:
                await self.renew()
            except Exception:
                # A tier that runs dry has degraded lists; a task that ends would end the worker.
                log.exception("Tokens were not renewed")

    async def close(self) -> None:
        await self._rate.close()
