"""The adaptive limit against a simulated engine: who is shed, how much is in hand, what is still ranked."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
import pytest

from inference.admission.concurrency import AdaptiveLimit, ConcurrencyLimits
from inference.admission.control import Admission, Group
from inference.admission.settings import AdmissionSettings
from inference.types import RankedList, RankRequest

UPDATE_S = 0.05
CEILING = 2_000
LIMITS = ConcurrencyLimits(floor=16, ceiling=CEILING, queue_target_ms=40.0, lag_target_ms=500.0, cpu_high=0.9)
FREE, STANDARD, PREMIUM = range(3)


class Unlimited:
    async def take(self, tier, tokens):
        return tokens

    async def close(self):
        pass


def admission(limits: ConcurrencyLimits = LIMITS, **settings) -> Admission:
    return Admission(AdmissionSettings(**settings), limits, Unlimited())


@dataclass
class Engine:
    """One runner, batches of 32 in order of arrival: 8 ms and a quarter for each list, 2,000 lists/s."""

    queue: deque[tuple[Group, RankRequest, float]] = field(default_factory=deque)
    running: list[tuple[Group, RankRequest, float]] = field(default_factory=list)
    until_s: float = 0.0
    started_s: float = 0.0
    slowness: float = 1.0

    capacity = 2_000

    def step(self, now_s: float) -> list[tuple[Group, float, float]]:
        """What is done by now: groups with how long each list waited and how long it was ranked."""
        done = []
        if self.running and now_s >= self.until_s:
            run_s = self.until_s - self.started_s
            done = [(group, self.started_s - since_s, run_s) for group, _, since_s in self.running]
            self.running = []
        if not self.running and self.queue:
            self.running = [self.queue.popleft() for _ in range(min(32, len(self.queue)))]
            self.started_s = now_s
            self.until_s = now_s + self.slowness * (0.008 + 0.00025 * len(self.running))
        return done


class Service:
    """Units of requests every 5 ms into an admission and the engine behind it."""

    def __init__(self, control: Admission, seed: int = 7) -> None:
        self.control = control
        self.engine = Engine()
        self.now_s = 0.0
        self.rng = np.random.default_rng(seed)
        self.missing: Counter[int] = Counter()
        self.outcomes: dict[int, list[RankedList]] = {}
        self.clear()

    def clear(self) -> None:
        self.asked: Counter[tuple[int, str]] = Counter()
        self.shed: Counter[tuple[int, str]] = Counter()
        self.ranked = 0
        self.in_flight: list[int] = []
        self.waited_ms: dict[int, list[float]] = {FREE: [], STANDARD: [], PREMIUM: []}

    def run(self, seconds: float, load: float, mix: tuple[float, float, float] = (0.5, 0.3, 0.2)) -> None:
        """`load` of the engine's capacity, as users of the three tiers in that `mix`."""
        rate = load * Engine.capacity
        steps = round(seconds / 0.001)
        start_s = self.now_s
        for step in range(steps):
            self.now_s = start_s + step * 0.001
            for group, queue_s, run_s in self.engine.step(self.now_s):
                self._answer(group, queue_s, run_s)
            if step % 5 == 0:
                self._arrive(int(self.rng.poisson(rate * 0.005)), mix)
            if step % 50 == 0:
                self.control.update(self.now_s, lag_s=0.0, cpu=min(1.0, load))
                self.in_flight.append(self.control.limit.in_flight)

    def shed_of(self, tier: int) -> float:
        asked = sum(count for (code, _), count in self.asked.items() if code == tier)
        return sum(count for (code, _), count in self.shed.items() if code == tier) / max(1, asked)

    def _arrive(self, count: int, mix: tuple[float, float, float]) -> None:
        requests = [
            RankRequest(int(user), None, tier=int(tier), priority=str(priority))  # type: ignore[arg-type]
            for user, tier, priority in zip(
                self.rng.integers(0, 10_000, count),
                self.rng.choice(3, count, p=mix),
                self.rng.choice(["low", "normal", "high"], count, p=[0.2, 0.7, 0.1]),
                strict=True,
            )
        ]
        ticket = self.control.admit(requests, self.now_s)
        self.asked.update((request.tier, request.priority) for request in requests)
        self.shed.update((requests[at].tier, requests[at].priority) for at in ticket.refused)
        for group in ticket.groups:
            self.missing[group.number] = len(group.requests)
            self.outcomes[group.number] = []
            self.engine.queue.extend((group, request, self.now_s) for request in group.requests)

    def _answer(self, group: Group, queue_s: float, run_s: float) -> None:
        timings_ms = {"queue": queue_s * 1000, "rank": run_s * 1000}
        self.outcomes[group.number].append(RankedList([1], [1.0], ["m"], "v1", "test", timings_ms))
        self.ranked += 1
        self.missing[group.number] -= 1
        if not self.missing[group.number]:
            for request in group.requests:
                self.waited_ms[request.tier].append(queue_s * 1000)
            self.control.finish(group, self.now_s, self.outcomes.pop(group.number))


def in_hand(limit: AdaptiveLimit, quarter: int) -> None:
    """Four quarters more in hand, one of them the top tier's; or fewer."""
    change, sign = (limit.enter, 1) if quarter > 0 else (limit.leave, -1)
    change(sign * quarter, is_top=True)
    change(sign * 3 * quarter, is_top=False)


def update(limit: AdaptiveLimit, now_s: float, oldest_s: float = 0.0, **load: float) -> None:
    load = {"lag_s": 0.0, "cpu": 0.0, **load}
    limit.update(now_s, oldest_lower_s=oldest_s, oldest_top_s=oldest_s, **load)


def test_below_capacity_nobody_is_shed():
    service = Service(admission())
    service.run(5.0, 0.6)
    assert not service.shed
    assert not service.control.limit.is_limiting


def test_at_half_again_the_capacity_the_top_tier_is_never_shed_while_lower_ones_are():
    service = Service(admission())
    service.run(12.0, 1.5)
    assert service.shed_of(PREMIUM) == 0
    assert service.shed_of(FREE) > service.shed_of(STANDARD) > 0
    assert service.shed_of(FREE) > 0.5


def test_at_half_again_the_capacity_what_is_in_hand_is_bounded_and_the_engine_stays_busy():
    service = Service(admission())
    service.run(5.0, 1.5)
    service.clear()
    service.run(12.0, 1.5)
    assert max(service.in_flight) < 0.2 * Engine.capacity
    assert service.ranked / 12.0 > 0.9 * Engine.capacity
    assert np.mean(service.waited_ms[PREMIUM]) < 1.5 * LIMITS.queue_target_ms
    assert np.percentile(service.waited_ms[PREMIUM], 99) < 3 * LIMITS.queue_target_ms


def test_within_a_tier_the_low_priority_is_shed_before_the_high_one():
    service = Service(admission())
    service.run(12.0, 1.5)
    share = {
        priority: service.shed[FREE, priority] / service.asked[FREE, priority]
        for priority in ("low", "normal", "high")
    }
    assert share["low"] > share["normal"] > share["high"]


def test_when_the_load_falls_everybody_is_let_in_again():
    service = Service(admission())
    service.run(5.0, 2.0)
    assert service.shed_of(FREE) > 0
    service.run(8.0, 0.5)
    service.clear()
    service.run(4.0, 0.5)
    assert not service.shed
    assert not service.control.limit.is_limiting


def test_a_top_tier_that_alone_is_too_much_is_limited_when_nobody_else_is_let_in():
    service = Service(admission())
    service.run(10.0, 2, mix=(0.1, 0.1, 0.8))
    service.clear()
    service.run(8.0, 2, mix=(0.1, 0.1, 0.8))
    assert 0 < service.shed_of(PREMIUM) < 0.6
    assert service.shed_of(FREE) > 0.95
    assert max(service.in_flight) < CEILING / 2
    assert service.ranked / 8.0 > 0.8 * Engine.capacity


@pytest.mark.parametrize("tiers", ["one tier", "three tiers"])
def test_when_all_users_are_of_the_top_tier_it_is_limited_as_soon_as_another_would_be(tiers):
    if tiers == "one tier":
        service = Service(admission(tiers=[{"name": "all"}], default_tier="all"))
    else:
        service = Service(admission())
    service.run(3.0, 1.5, mix=(0.0, 0.0, 1.0))
    service.clear()
    service.run(5.0, 1.5, mix=(0.0, 0.0, 1.0))
    assert 0.25 < service.shed_of(PREMIUM) < 0.45
    assert max(service.in_flight) < 0.2 * Engine.capacity
    assert service.ranked / 5.0 > 0.9 * Engine.capacity
    service.run(3.0, 0.5)
    service.clear()
    service.run(3.0, 0.5)
    assert not service.shed


def test_an_engine_that_hangs_is_noticed_without_any_answer_and_used_again_when_it_answers():
    service = Service(admission())
    service.run(2.0, 0.6)
    service.engine.slowness = 500.0  # the next batch takes eight seconds
    service.clear()
    service.run(6.0, 0.6, mix=(0.5, 0.5, 0.0))
    assert service.shed_of(FREE) > 0.9
    service.engine.slowness = 1.0
    service.run(15.0, 0.5)
    service.clear()
    service.run(5.0, 0.5)
    assert not service.shed


def limit_after(*, lag_s: float = 0.0, cpu: float = 0.0, cut: bool = False, updates: int = 20) -> float:
    """Where a limit stands after as many updates, started at 100 lists if `cut`."""
    limit = AdaptiveLimit(LIMITS, levels=9, top=3)
    if cut:
        in_hand(limit, 50)
        limit.waited(2 * LIMITS.queue_target_ms / 1000, 200, is_top=False)
        update(limit, 0.0, oldest_s=0.0, lag_s=0.0, cpu=0.0)
        in_hand(limit, -50)
        assert limit.limit == 100
    if lag_s:
        in_hand(limit, 50)
    for number in range(updates):
        update(limit, 1.0 + number * UPDATE_S, oldest_s=0.0, lag_s=lag_s, cpu=cpu)
    return limit.limit


def test_a_loop_that_lags_for_long_cuts_and_a_single_stall_does_not():
    assert limit_after(lag_s=1.0, updates=2) == CEILING
    assert limit_after(lag_s=1.0, updates=20) < CEILING


def test_a_top_tier_that_is_served_first_is_not_limited_because_the_others_wait():
    limit = AdaptiveLimit(LIMITS, levels=9, top=3)
    in_hand(limit, 100)
    for number in range(40):
        limit.waited(0.005, 100, is_top=True)
        limit.waited(0.500, 300, is_top=False)
        limit.update(number, oldest_lower_s=0.6, oldest_top_s=0.005, lag_s=0.0, cpu=1.0)
    assert limit.limit == LIMITS.floor
    assert limit.top_limit == CEILING


def test_what_the_loop_adds_to_a_lists_way_is_no_waiting_for_an_engine():
    limit = AdaptiveLimit(LIMITS, levels=9, top=3)
    for number in range(-3, 0):
        update(limit, number * UPDATE_S, lag_s=0.045, cpu=1.0)
    in_hand(limit, 50)
    for number in range(20):
        limit.waited(0.150, 200, is_top=True)
        update(limit, number * UPDATE_S, oldest_s=0.15, lag_s=0.045, cpu=1.0)
    assert not limit.is_limiting
    for number in range(20, 40):
        limit.waited(0.200, 200, is_top=True)
        update(limit, number * UPDATE_S, oldest_s=0.2, lag_s=0.045, cpu=1.0)
    assert limit.is_limiting


def test_a_target_nobody_can_meet_leaves_the_floor_to_the_lower_tiers_and_all_to_the_top():
    service = Service(admission(ConcurrencyLimits(64, CEILING, 1.0, 500.0, 0.9)))
    service.run(8.0, 0.5)
    assert service.shed_of(PREMIUM) == 0
    assert service.control.limit.limit == 64
    assert service.shed_of(STANDARD) < 0.1


def test_with_all_processors_busy_the_limit_rises_a_tenth_as_fast():
    idle, busy = limit_after(cut=True, cpu=0.5, updates=5), limit_after(cut=True, cpu=1.0, updates=5)
    assert 100 < busy < 106
    assert idle > 150


def test_around_the_target_the_limit_stays_where_it_is():
    limit = AdaptiveLimit(LIMITS, levels=9, top=3)
    in_hand(limit, 50)
    update(limit, 0.0, oldest_s=0.08, lag_s=0.0, cpu=0.0)
    for number, share in enumerate((0.75, 0.95, 0.8, 1.0)):
        limit.waited(share * LIMITS.queue_target_ms / 1000, 10, is_top=False)
        update(limit, 1.0 + number, oldest_s=0.0, lag_s=0.0, cpu=0.0)
        assert limit.limit == 100


def test_a_cut_waits_for_the_answers_that_tell_what_the_one_before_did():
    limit = AdaptiveLimit(LIMITS, levels=9, top=3)
    in_hand(limit, 100)
    for at_s in (0.0, 0.05, 0.1, 0.15):
        update(limit, at_s, oldest_s=0.2, lag_s=0.0, cpu=0.0)
        assert limit.limit == 200
    update(limit, 0.2, oldest_s=0.2, lag_s=0.0, cpu=0.0)
    assert limit.limit == 100


@pytest.mark.parametrize("size", [1, 32, 256])
def test_the_ceiling_holds_for_everybody_and_the_highest_go_in_first(size):
    control = admission(ConcurrencyLimits(16, 100, 40.0, 500.0, 0.9))
    tickets = []
    for _ in range(0, 256, size):
        requests = [RankRequest(user, None, tier=user % 3) for user in range(size)]
        tickets.append((requests, control.admit(requests, 0.0)))
    assert control.limit.in_flight == 100
    requests, ticket = tickets[-1]
    if size == 256:
        assert {requests[at].tier for at in ticket.refused} == {FREE, STANDARD}
        assert [(group.is_top, len(group.requests)) for group in ticket.groups] == [(False, 15), (True, 85)]
    for group in [group for _, ticket in tickets for group in ticket.groups] * 2:
        control.finish(group, 1.0)
    assert control.limit.in_flight == 0


def test_without_adapting_only_the_ceiling_holds():
    service = Service(admission(adaptive=False))
    service.run(10.0, 1.5)
    assert max(service.in_flight) == CEILING
