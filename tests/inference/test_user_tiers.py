"""Tiers of users from the store: asked once for many, remembered for a while, never waited for twice."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from features.store import StoreUnavailable
from inference.admission.settings import AdmissionSettings
from inference.admission.tiers import Tiers
from inference.admission.users import UserTiers

FREE, STANDARD, PREMIUM = range(3)


class Store:
    def __init__(self) -> None:
        self.names = {1: "free", 2: "premium", 3: "gone"}
        self.asked: list[list[int]] = []
        self.away = False

    async def tiers(self, user_ids: Sequence[int]) -> list[str | None]:
        self.asked.append(sorted(user_ids))
        await asyncio.sleep(0)
        if self.away:
            raise StoreUnavailable("away")
        return [self.names.get(user) for user in user_ids]


class World:
    def __init__(self, kept: int = 100) -> None:
        self.store = Store()
        self.now_s = 0.0
        tiers = Tiers(AdmissionSettings())
        self.users = UserTiers(self.store, tiers, ttl_s=10.0, kept=kept, clock=lambda: self.now_s)


async def test_tiers_are_those_of_the_store_and_strangers_have_the_default_one() -> None:
    world = World()
    assert await world.users.codes([1, 2, 3, 4, 2]) == [FREE, PREMIUM, STANDARD, STANDARD, PREMIUM]
    assert await world.users.codes([2, 4]) == [PREMIUM, STANDARD]
    assert world.store.asked == [[1, 2, 3, 4]]


async def test_who_asks_together_shares_a_round_trip() -> None:
    world = World()
    found = await asyncio.gather(*(world.users.codes([user, 2]) for user in (1, 3, 9)))
    assert found == [[FREE, PREMIUM], [STANDARD, PREMIUM], [STANDARD, PREMIUM]]
    assert world.store.asked == [[1, 2, 3, 9]]


async def test_a_change_is_seen_when_the_old_tier_has_aged() -> None:
    world = World()
    assert await world.users.codes([1]) == [FREE]
    world.store.names[1] = "premium"
    assert await world.users.codes([1]) == [FREE]
    world.now_s = 10.0
    assert await world.users.codes([1]) == [PREMIUM]


async def test_a_store_that_is_away_takes_nobodys_tier() -> None:
    world = World()
    await world.users.codes([2])
    world.now_s, world.store.away = 20.0, True
    assert await world.users.codes([2, 1]) == [PREMIUM, STANDARD]
    assert await world.users.codes([2, 1]) == [PREMIUM, STANDARD]
    assert len(world.store.asked) == 2
    world.now_s, world.store.away = 21.0, False
    assert await world.users.codes([2, 1]) == [PREMIUM, FREE]


async def test_no_more_users_are_remembered_than_were_allowed() -> None:
    world = World(kept=2)
    for user in (1, 2, 5, 2, 1):
        await world.users.codes([user])
    assert world.store.asked == [[1], [2], [5], [1]]


async def test_one_who_gives_up_takes_the_answer_from_nobody() -> None:
    world = World()
    leaving, staying = (asyncio.ensure_future(world.users.codes([2])) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    assert await staying == [PREMIUM]


async def test_without_a_store_all_have_the_default_tier() -> None:
    users = UserTiers(None, Tiers(AdmissionSettings()), ttl_s=1, kept=10)
    assert await users.codes([1, 2]) == [STANDARD, STANDARD]
