"""`tailrace bench memory`: what a user's behaviour sequence takes in Redis.

Fills an empty Redis and reads what the server says it uses. One user in 500 is filled event
by event through the real script, the rest by writing such values directly, which is fast; the two
must take the same bytes. The goal is 1.5 KiB for a user with 100 events, its key, expiry and share
of the hash tables included.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import redis

from features import keys
from features.redis_store import RedisStore
from features.sequence import MAX_EVENTS, NARROW, NARROW_EVENT, pack_fence, unpack
from features.settings import FeatureSettings
from features.store import Append

GOAL_BYTES: Final = 1536
_SEED: Final = 7
_START_S: Final = 1_511_539_200
_BY_SCRIPT: Final = 500


def run(redis_url: str, users: int = 100_000) -> dict[str, Any]:
    """Fill `users` users with 100 events each and measure. The Redis must be empty; it is left full."""
    with redis.Redis.from_url(redis_url) as client:
        if client.dbsize():
            raise ValueError(f"the Redis at {redis_url} is not empty; the measure needs its own")
        before_bytes = _kept_bytes(client.info("memory"))
        started_s = time.perf_counter()
        asyncio.run(_fill_by_script(redis_url, range(0, users, _BY_SCRIPT)))
        _fill_directly(client, [user for user in range(users) if user % _BY_SCRIPT])
        filled_s = time.perf_counter() - started_s
        memory = client.info("memory")
        scripted = _sample(range(0, users, _BY_SCRIPT))
        direct = _sample([user for user in range(users) if user % _BY_SCRIPT])
        values: list[bytes] = client.mget(scripted + direct)
        if client.dbsize() != users or unpack(values).lengths.min() != MAX_EVENTS:
            raise RuntimeError(f"expected {users} users of {MAX_EVENTS} events, found fewer")
        usages = [client.memory_usage(key) for key in scripted + direct]
        if len(set(usages)) != 1 or len(set(map(len, values))) != 1:
            raise RuntimeError("values written directly differ in size from those of the script")
        server = client.info("server")
    return {
        "users": users,
        "events_per_user": MAX_EVENTS,
        "bytes_per_user": round((_kept_bytes(memory) - before_bytes) / users, 1),
        "goal_bytes_per_user": GOAL_BYTES,
        "memory_usage_bytes": usages[0],
        "value_bytes": len(values[0]),
        "used_memory_bytes": memory["used_memory"],
        "used_memory_rss_bytes": memory["used_memory_rss"],
        "fill_s": round(filled_s, 1),
        "seed": _SEED,
        "redis_version": server["redis_version"],
        "allocator": memory["mem_allocator"],
    }


def _kept_bytes(memory: dict[str, Any]) -> int:
    """What Redis uses, without what is on its way to the append-only file or to clients: how much that is
    depends on how fast the disk happens to be."""
    passing = ("mem_aof_buffer", "mem_clients_normal", "mem_clients_slaves")
    return int(memory["used_memory"]) - sum(int(memory.get(name, 0)) for name in passing)


def _user_id(user: int) -> int:
    return 100_000 + user * 9


def _sample(users: Sequence[int]) -> list[str]:
    chosen = random.Random(_SEED).sample(users, min(200, len(users)))
    return [keys.sequence(_user_id(user)) for user in chosen]


def _events(user: int) -> list[Append]:
    rng = random.Random(_SEED + user)
    return [
        Append(
            user_id=_user_id(user),
            item_id=rng.randrange(1, 5_200_000),
            category_id=rng.randrange(1, 5_200_000),
            behavior=event & 3,
            timestamp=_START_S + event * 60,
            epoch=1,
            partition=user & 7,
            offset=user * MAX_EVENTS + event,
        )
        for event in range(MAX_EVENTS)
    ]


async def _fill_by_script(redis_url: str, users: Sequence[int]) -> None:
    store = RedisStore(redis_url, settings=FeatureSettings(store_timeout_ms=30_000))
    for user in users:
        for event in _events(user):
            await store.append([event])
    await store.close()


def _fill_directly(client: redis.Redis, users: Sequence[int]) -> None:
    """Values in the script's layout, written as they are."""
    lifetime_ms = keys.SEQUENCE_TTL_S * 1000
    rng = np.random.default_rng(_SEED)
    events = np.zeros(MAX_EVENTS, NARROW_EVENT)
    events["timestamp"] = _START_S + 60 * np.arange(MAX_EVENTS)
    for start in range(0, len(users), 1000):
        pipeline = client.pipeline(transaction=False)
        for user in users[start : start + 1000]:
            events["item"] = rng.integers(1, 5_200_000, MAX_EVENTS)
            events["category_behavior"] = rng.integers(1, 5_200_000, MAX_EVENTS)
            fence = pack_fence(1, user & 7, user * MAX_EVENTS + MAX_EVENTS - 1)
            value = bytes((NARROW, 1)) + fence + events.tobytes()
            pipeline.set(keys.sequence(_user_id(user)), value, px=lifetime_ms)
        pipeline.execute()
