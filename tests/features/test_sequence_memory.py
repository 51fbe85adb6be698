from __future__ import annotations

import asyncio

import pytest
import redis

from features.redis_store import RedisStore
from infra.bench.sequence_memory import GOAL_BYTES, run


def test_a_user_with_a_hundred_events_fits_in_a_kibibyte_and_a_half(redis_url: str) -> None:
    report = run(redis_url, users=2_000)
    # Fewer users than the full measure has: fixed costs and table growth weigh more, not less.
    assert 1_218 < report["bytes_per_user"] <= GOAL_BYTES


def test_the_measure_refuses_a_redis_with_data_in_it(redis_url: str) -> None:
    run(redis_url, users=1)
    with pytest.raises(ValueError, match="not empty"):
        run(redis_url, users=1)


def test_users_without_a_tier_cost_no_byte_for_it_and_users_with_one_less_than_a_hundred(
    redis_url: str,
) -> None:
    async def all_are_told_their_tier(tier: str | None) -> None:
        store = RedisStore(redis_url)
        await store.read(users)
        for user in users:
            await store.set_tier(user, tier)
        await store.close()

    users = range(2_000)
    with redis.Redis.from_url(redis_url) as client:
        asyncio.run(all_are_told_their_tier(None))
        assert client.dbsize() == 0
        before_bytes = client.info("memory")["used_memory_dataset"]
        asyncio.run(all_are_told_their_tier("premium"))
        grown_bytes = client.info("memory")["used_memory_dataset"] - before_bytes
    assert 0 < grown_bytes / len(users) < 100
