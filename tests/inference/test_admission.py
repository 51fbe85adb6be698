"""Rates of users and tiers, deadlines, and what a refusal costs; the adaptive limit has a file of its own."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import redis
from pydantic import ValidationError

from features import keys
from inference.admission.clients import ClientBuckets, places
from inference.admission.concurrency import ConcurrencyLimits
from inference.admission.control import Admission
from inference.admission.leases import Leases
from inference.admission.settings import AdmissionSettings, Tier
from inference.admission.shared import CountedRate
from inference.admission.tiers import Tiers
from inference.errors import DeadlineExceeded, Overloaded
from inference.types import RankedList, RankRequest
from infra.local.server import free_port
from tests.support import eventually_async

ROOT = Path(__file__).resolve().parent.parent.parent
LIMITS = ConcurrencyLimits(16, 10_000, 1_000.0, 500.0, 0.9)
FREE, STANDARD, PREMIUM = range(3)


class Pot:
    """A shared rate of so many tokens in all."""

    def __init__(self, tokens: int = 10**9) -> None:
        self.tokens = tokens
        self.calls: list[tuple[str, int]] = []

    async def take(self, tier: Tier, tokens: int) -> int:
        self.calls.append((tier.name, tokens))
        taken = min(tokens, self.tokens)
        self.tokens -= taken
        return taken

    async def close(self) -> None:
        pass


def settings(**free: float) -> AdmissionSettings:
    tiers = (Tier(name="free", **free), Tier(name="standard"), Tier(name="premium"))  # type: ignore[arg-type]
    return AdmissionSettings(tiers=tiers)


def admission(pot: Pot | None = None, **free: float) -> Admission:
    return Admission(settings(**free), LIMITS, pot or Pot())


def request(user: int, tier: int = FREE, **changes) -> RankRequest:
    return RankRequest(user, None, tier=tier, **changes)


def reasons(control: Admission, requests: list[RankRequest], now_s: float = 0.0) -> Counter[str]:
    return Counter(refusal.reason for refusal in control.admit(requests, now_s).refused.values())


# Users -----------------------------------------------------------------------------------------


def test_a_user_has_his_burst_at_once_then_his_rate_and_others_notice_nothing():
    control = admission(client_rate=2, client_burst=5)
    assert reasons(control, [request(1)] * 9) == {"client-rate": 4}
    assert reasons(control, [request(1), request(2), request(1)]) == {"client-rate": 2}
    assert reasons(control, [request(1)] * 3, now_s=1.0) == {"client-rate": 1}
    assert reasons(control, [request(1)] * 9, now_s=100.0) == {"client-rate": 4}


def test_of_a_user_over_his_rate_the_higher_priority_goes_first():
    control = admission(client_rate=1, client_burst=2)
    asked = [request(1, priority=priority) for priority in ("low", "normal", "high", "low", "high")]
    assert sorted(control.admit(asked, 0.0).refused) == [0, 1, 3]


def test_users_of_unlimited_tiers_share_nothing_with_limited_ones():
    control = admission(client_rate=1, client_burst=1)
    asked = [request(user % 2, tier=user % 3) for user in range(600)]
    refused = control.admit(asked, 0.0).refused
    assert {asked[at].tier for at in refused} == {FREE}
    assert len(refused) == 200 - 2


def test_thousands_of_users_at_once_keep_each_their_own_bucket():
    buckets = ClientBuckets(65_536)
    users = np.random.default_rng(5).integers(0, 2**62, 20_000)
    rate, burst = np.ones(len(users)), np.full(len(users), 3.0)
    for _ in range(2):
        for part in np.split(np.arange(len(users)), 100):
            buckets.take(users[part], rate[part], burst[part], 10.0)
    left = buckets.tokens(users, rate, burst, 10.0)
    # A row has eight places and about two and a half users: hardly anyone is forgotten.
    assert np.mean(left == 1.0) > 0.999
    assert buckets.tokens(users[:1], rate[:1], burst[:1], 11.0) == pytest.approx([2.0])


def test_more_users_than_places_forget_those_who_used_least():
    buckets = ClientBuckets(64)
    rate, burst = np.ones(1), np.full(1, 100.0)
    heavy = np.array([7])
    for _ in range(50):
        buckets.take(heavy, rate, burst, 0.0)
    for user in range(1_000, 3_000):
        buckets.take(np.array([user]), rate, burst, 0.0)
    assert buckets.tokens(heavy, rate, burst, 0.0) == pytest.approx([50.0])


def test_new_users_of_one_row_in_one_batch_all_find_a_place():
    buckets = ClientBuckets(8)  # one row
    users = np.arange(8)
    rate, burst = np.ones(8), np.full(8, 4.0)
    buckets.take(users, rate, burst, 0.0)
    assert buckets.tokens(users, rate, burst, 0.0).tolist() == [3.0] * 8


def test_places_count_within_each_group():
    groups = np.random.default_rng(3).integers(0, 9, 500)
    seen: Counter[int] = Counter()
    expected = []
    for group in groups.tolist():
        expected.append(seen[group])
        seen[group] += 1
    assert places(groups).tolist() == expected


# Tiers -----------------------------------------------------------------------------------------


async def test_a_tier_has_its_lease_and_no_more_until_that_is_renewed():
    control = admission(rate=40)
    assert reasons(control, [request(1)] * 3) == {"tier-rate": 3}
    await control.leases.renew()
    asked = [request(user, tier=user % 3) for user in range(60)]
    assert reasons(control, asked) == {"tier-rate": 10}
    await control.leases.renew()
    assert reasons(control, asked) == {"tier-rate": 10}


async def test_leases_take_what_was_used_and_cost_nothing_when_nothing_was():
    pot = Pot(tokens=25)
    leases = Leases(settings(rate=40), pot)
    for used in (0, 4, 0, 10, 9, 2):
        leases.take(np.array([used, 50, 50]))
        await leases.renew()
    # The share of a process is ten; of its 9 the next to last call gets one, and the last gets none.
    assert pot.calls == [("free", 10), ("free", 4), ("free", 10), ("free", 9), ("free", 10)]
    assert leases.tokens.tolist() == [0, np.inf, np.inf]


async def test_a_user_over_his_rate_costs_his_tier_no_token():
    control = admission(rate=40, client_rate=1, client_burst=1)
    await control.leases.renew()
    assert reasons(control, [request(1)] * 500) == {"client-rate": 499}
    assert reasons(control, [request(user) for user in range(2, 11)]) == {}
    assert reasons(control, [request(99)]) == {"tier-rate": 1}


async def test_a_tier_without_tokens_costs_its_users_none_of_theirs():
    control = admission(rate=40, client_rate=0.001, client_burst=1)
    assert reasons(control, [request(1)]) == {"tier-rate": 1}
    await control.leases.renew()
    assert reasons(control, [request(1)]) == {}


async def test_of_a_tier_that_runs_dry_the_higher_priority_goes_first():
    control = admission(rate=8)
    await control.leases.renew()
    asked = [request(user, priority="high" if user > 7 else "low") for user in range(10)]
    assert [asked[at].user_id for at in control.admit(asked, 0.0).refused] == [0, 1, 2, 3, 4, 5, 6, 7]


# Deadlines -------------------------------------------------------------------------------------


def test_less_time_than_the_fastest_list_of_late_took_is_refused_and_old_news_is_forgotten():
    control = admission()
    slow = RankedList([1], [1.0], ["m"], "v1", "test", {"rank": 30.0})
    control.finish(control.admit([request(1)], 0.0).groups[0], 0.05, [slow])
    soon, later = request(1, deadline_s=1.02), request(1, deadline_s=1.2)
    ticket = control.admit([soon, later], 1.0)
    assert [(at, refusal.reason) for at, refusal in ticket.refused.items()] == [(0, "deadline")]
    assert isinstance(ticket.refused[0].error, DeadlineExceeded)
    assert [(group.positions, group.requests) for group in ticket.groups] == [([1], [later])]
    control.finish(ticket.groups[0], 1.1)
    for now_s in (1.1, 2.2):
        control.update(now_s, lag_s=0.0, cpu=0.0)
    assert reasons(control, [request(1, deadline_s=3.01)], now_s=3.0) == {}


def test_a_deadline_that_has_passed_is_refused_without_any_news():
    assert reasons(admission(), [request(1, deadline_s=4.0)], now_s=5.0) == {"deadline": 1}


# Defaults and settings -------------------------------------------------------------------------


def test_left_alone_nobody_is_refused_up_to_the_ceiling():
    control = Admission(AdmissionSettings(), LIMITS, Pot())
    asked = [request(user % 7, tier=user % 3) for user in range(LIMITS.ceiling)]
    assert control.admit(asked, 0.0).refused == {}
    ticket = control.admit([request(1)], 0.0)
    assert isinstance(ticket.refused[0].error, Overloaded)
    assert not control.leases.any_limit


def test_who_has_no_tier_or_one_that_is_gone_has_the_default_one():
    tiers = Tiers(AdmissionSettings())
    assert [tiers.names[tiers.code(name)] for name in ("premium", "free", None, "gold")] == [
        "premium",
        "free",
        "standard",
        "standard",
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"tiers": "[]"},
        {"tiers": '[{"name":"a"},{"name":"a"}]', "default_tier": "a"},
        {"tiers": '[{"name":"a"}]'},
        {"tiers": '[{"name":"a","burst":5}]', "default_tier": "a"},
        {"tiers": '[{"name":"a","rate":100,"burst":150}]', "default_tier": "a"},
        {"tiers": '[{"name":"a","rate":0.5}]', "default_tier": "a"},
        {"tiers": '[{"name":"a","rate":-1}]', "default_tier": "a"},
        {"tiers": '[{"name":"A b"}]', "default_tier": "A b"},
        {"tiers": '[{"name":"a","speed":1}]', "default_tier": "a"},
        {"lease_share": "0"},
        {"cpu_high": "1.0"},
    ],
)
def test_wrong_settings_are_refused(wrong, monkeypatch):
    for name, value in wrong.items():
        monkeypatch.setenv(f"ADMISSION_{name.upper()}", value)
    with pytest.raises(ValidationError):
        AdmissionSettings()


@pytest.mark.parametrize(
    ("rate", "burst", "window_s", "most"), [(100, None, 1, 100), (100, 300, 3, 300), (0.5, 1, 2, 1)]
)
def test_a_burst_is_a_window_of_whole_seconds(rate, burst, window_s, most):
    tier = Tier(name="a", rate=rate, burst=burst)
    assert (tier.window_s, tier.most) == (window_s, most)


# Shared ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "redis"])
async def test_a_shared_rate_gives_what_is_left_and_not_more(where, request):
    url = request.getfixturevalue("redis_url") if where == "redis" else None
    rate = CountedRate(url, timeout_s=5.0)
    free, paid = Tier(name="free", rate=100, burst=6_000), Tier(name="paid", rate=10, burst=600)
    assert [await rate.take(free, 2_500) for _ in range(4)] == [2_500, 2_500, 1_000, 0]
    assert await rate.take(paid, 7) == 7
    await rate.close()


async def test_what_is_counted_in_redis_lies_under_names_of_ours_and_disappears(redis_url):
    rate = CountedRate(redis_url, timeout_s=5.0)
    await rate.take(Tier(name="free", rate=5, burst=10), 3)
    with redis.Redis.from_url(redis_url) as client:
        (name,) = client.keys()
        assert name.decode().startswith(f"{keys.TIER_USE_PREFIX}:{{{keys.TIER_USE_NAMESPACE}/free/")
        assert 0 < client.pttl(name) <= 4_000
    await rate.close()


async def test_without_redis_a_process_counts_alone_and_says_so_once(caplog):
    rate = CountedRate(f"redis://127.0.0.1:{free_port()}/0", timeout_s=0.5)
    tier = Tier(name="free", rate=10, burst=600)
    assert [await rate.take(tier, 400) for _ in range(3)] == [400, 200, 0]
    assert not rate.is_shared
    assert len([line for line in caplog.messages if "each process counts alone" in line]) == 1
    await rate.close()


async def test_a_redis_that_hangs_costs_the_timeout_now_and_then_and_is_used_again_when_it_answers(
    redis_server, redis_url
):
    rate = CountedRate(redis_url, timeout_s=0.1)
    tier = Tier(name="free", rate=10, burst=6_000)
    assert await rate.take(tier, 5) == 5
    redis_server.pause()
    try:
        started_s = time.monotonic()
        assert [await rate.take(tier, 1) for _ in range(50)] == [1] * 50
        assert time.monotonic() - started_s < 2.5
        assert not rate.is_shared
    finally:
        redis_server.resume()

    async def shared_again() -> bool:
        await rate.take(tier, 1)
        return rate.is_shared

    await eventually_async(shared_again)
    await rate.close()


GREEDY = """
import asyncio, sys, time
import numpy as np
from inference.admission.leases import Leases
from inference.admission.settings import AdmissionSettings, Tier
from inference.admission.shared import CountedRate

async def main():
    settings = AdmissionSettings(
        tiers=[Tier(name="free", rate=200, burst=200)], default_tier="free", lease_share=0.1, lease_ms=20
    )
    leases = Leases(settings, CountedRate(sys.argv[1], 5.0))
    await leases.renew()
    renewing = asyncio.create_task(leases.run())
    print("ready", flush=True)
    sys.stdin.readline()
    started_s, used = time.time(), 0
    while time.time() < started_s + 2.0:
        take = int(leases.tokens[0])
        leases.take(np.array([take]))
        used += take
        await asyncio.sleep(0.002)
    renewing.cancel()
    print(started_s, time.time(), used, flush=True)

asyncio.run(main())
"""


async def test_two_processes_share_a_tiers_rate_within_the_stated_bound(redis_url):
    async def start() -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", GREEDY, redis_url), cwd=ROOT, stdin=-1, stdout=-1
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        return process

    processes = [await start(), await start()]
    said = await asyncio.gather(*(process.communicate(b"go\n") for process in processes))
    reports = [tuple(map(float, out.split())) for out, _ in said]
    span_s = max(ended for _, ended, _ in reports) - min(started for started, _, _ in reports)
    used = sum(count for _, _, count in reports)
    assert used <= 200 * span_s + 200 + 2 * 0.1 * 200
    # What the rate allows is really to be had, and both have some.
    assert used > 0.8 * 200 * 2.0
    assert all(count > 0 for _, _, count in reports)
