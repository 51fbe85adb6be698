"""What all processes have used of a tier's rate, counted by the library `limits`.

Its sliding-window counter of `burst` lists per burst/rate seconds lets through what a token bucket of
that rate and burst would: no more than rate · T + burst in any T seconds, and the one more that it
rounds to. A hit costs a quarter of a millisecond through Redis, which is why requests do not come here:
`leases` does, with a `cost` of many tokens, once in a while. For users it would be a key and a call
each; `clients` has a table instead.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

from features import keys
from features.breaker import Breaker
from inference.admission.settings import Tier

if TYPE_CHECKING:
    from limits.aio.strategies import SlidingWindowCounterRateLimiter

log = logging.getLogger(__name__)

# A Redis that is away is asked this often: each time costs the timeout.
RETRY_S: Final = 1.0


class CountedRate:
    """In Redis where `redis_url` is given, else in this process.

    While Redis does not answer within `timeout_s` the process counts alone: the tier then has its whole
    rate in each process, so a Redis that is away lets more through, never nothing.
    """

    def __init__(self, redis_url: str | None, timeout_s: float) -> None:
        self._redis_url = redis_url
        self._timeout_s = timeout_s
        self._counters: _Counters | None = None
        self._breaker = Breaker(failures=1, open_s=RETRY_S)

    @property
    def is_shared(self) -> bool:
        """Whether other processes are counted, as far as the last call tells."""
        return self._redis_url is not None and not self._breaker.is_open

    async def take(self, tier: Tier, tokens: int) -> int:
        """Take at most that many; how many it were. One call to Redis, three where it runs dry."""
        if self._counters is None:
            # Not sooner: it takes an eighth of a second and only limited tiers need it.
            self._counters = _Counters(self._redis_url, self._timeout_s)
        counters = self._counters
        if counters.together is not None and self._breaker.allow():
            try:
                async with asyncio.timeout(self._timeout_s):
                    taken = await counters.take(counters.together, tier, tokens)
            except counters.failures as error:
                if not self._breaker.is_open:
                    log.warning("Rates are not shared, each process counts alone: %r", error)
                self._breaker.failed()
            else:
                if self._breaker.is_open:
                    log.info("Rates are shared again")
                self._breaker.succeeded()
                return taken
        return await counters.take(counters.alone, tier, tokens)

    async def close(self) -> None:
        if self._counters is not None:
            await self._counters.close()


class _Counters:
    """What is imported from `limits`: one counter for this process, one for all."""

    def __init__(self, redis_url: str | None, timeout_s: float) -> None:
        from limits import RateLimitItemPerSecond
        from limits.aio.strategies import SlidingWindowCounterRateLimiter
        from limits.errors import StorageError
        from limits.storage import storage_from_string

        self.failures = (StorageError, OSError, TimeoutError)
        self._item = RateLimitItemPerSecond
        self._storage: Any = None
        self.alone = SlidingWindowCounterRateLimiter(storage_from_string("async+memory://"))
        self.together: SlidingWindowCounterRateLimiter | None = None
        if redis_url is not None:
            self._storage = storage_from_string(
                f"async+{redis_url}",
                wrap_exceptions=True,
                implementation="redispy",
                key_prefix=keys.TIER_USE_PREFIX,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                protocol=2,
            )
            self.together = SlidingWindowCounterRateLimiter(self._storage)

    async def take(self, counter: SlidingWindowCounterRateLimiter, tier: Tier, tokens: int) -> int:
        item = self._item(tier.most, tier.window_s, namespace=keys.TIER_USE_NAMESPACE)
        if await counter.hit(item, tier.name, cost=tokens):
            return tokens
        left = min(tokens, (await counter.get_window_stats(item, tier.name)).remaining)
        return left if left > 0 and await counter.hit(item, tier.name, cost=left) else 0

    async def close(self) -> None:
        if self._storage is not None:
            await self._storage.bridge.storage.aclose()
