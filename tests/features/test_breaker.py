from __future__ import annotations

from features.breaker import Breaker


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_it_opens_after_a_streak_and_not_after_as_many_failures_apart() -> None:
    breaker = Breaker(3, 1.0, clock=Clock())
    for _ in range(5):
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
    assert breaker.allow()
    for _ in range(3):
        assert breaker.allow()
        breaker.failed()
    assert breaker.is_open
    assert not breaker.allow()


def test_while_open_one_probe_goes_through_at_a_time() -> None:
    clock = Clock()
    breaker = Breaker(1, 2.0, clock=clock)
    breaker.failed()
    clock.now_s += 1.9
    assert not breaker.allow()
    clock.now_s += 0.2
    assert breaker.allow()
    assert not breaker.allow()


def test_a_failed_probe_keeps_it_open_and_a_good_one_closes_it() -> None:
    clock = Clock()
    breaker = Breaker(1, 2.0, clock=clock)
    breaker.failed()
    clock.now_s += 3.0
    assert breaker.allow()
    breaker.failed()
    clock.now_s += 1.0
    assert not breaker.allow()
    clock.now_s += 2.0
    assert breaker.allow()
    breaker.succeeded()
    assert not breaker.is_open
    assert all(breaker.allow() for _ in range(5))


def test_a_probe_that_never_reports_back_does_not_hold_it_open_for_ever() -> None:
    clock = Clock()
    breaker = Breaker(1, 2.0, clock=clock)
    breaker.failed()
    clock.now_s += 3.0
    assert breaker.allow()
    clock.now_s += 3.0
    assert breaker.allow()
