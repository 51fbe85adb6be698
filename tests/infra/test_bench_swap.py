"""What `bench swap` says about memory and latency from swap to swap."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from infra.bench import options, swap
from infra.bench.swap import Ends, Slope

RNG = np.random.default_rng(3)


def test_a_leak_is_found_in_noise_ten_times_as_large():
    found = Slope.of(5.0 * np.arange(100) + RNG.normal(0, 50, 100), digits=3)
    assert 0 < found.low < 5.0 < found.high
    assert found.per_swap == pytest.approx(5.0, rel=0.2)


def test_noise_alone_is_no_slope():
    covered = 0
    for _ in range(200):
        found = Slope.of(RNG.normal(300, 20, 60), digits=6)
        assert found.low <= found.per_swap <= found.high
        covered += found.low <= 0 <= found.high
    # 95 % of them; fewer than 90 % would be a matter of one chance in a thousand.
    assert covered >= 180


def test_one_swap_that_is_out_of_line_tilts_nothing():
    values = np.arange(40.0)
    values[-1] = 1e6
    assert Slope.of(values, digits=3).per_swap == 1.0


def test_a_slope_needs_two_swaps():
    with pytest.raises(ValueError, match="two swaps"):
        Slope.of([300.0], digits=1)


def test_ends_are_tenths():
    assert Ends.of([*[1.0] * 10, *[5.0] * 80, *[2.0] * 10]) == Ends(1.0, 2.0)
    assert Ends.of([4.0, 3.0]) == Ends(4.0, 3.0)


@pytest.mark.timeout(600)  # the first swap imports libraries at a tenth of a processor
def test_load_follows_the_machine_and_what_is_steady_lasts_as_long_as_the_swap_before(
    registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capacities = iter([300.0, 200.0])

    async def capacity(*_: object, **__: object) -> float:
        return next(capacities)

    monkeypatch.setattr(swap, "capacity", capacity)
    monkeypatch.setattr(swap, "tune", lambda: None)
    monkeypatch.setattr(swap, "FIRST_STEADY_S", 0.5)
    events, _ = options.events(None, 2_000, 1)
    result, found = asyncio.run(
        swap.measure(
            events,
            registry=registry,
            swaps=5,
            versions=2,
            load=0.5,
            steady_s=None,
            seed=1,
            say=lambda line: None,
        )
    )
    assert [one.capacity_lists_per_s for one in found] == [300.0] * 4 + [200.0]
    assert [one.steady_s for one in found] == [0.5, *(one.seconds for one in found[:-1])]
    assert [one.seen_before for one in found] == [False, False, True, True, False]
    assert result.failed == result.unanswered == 0
    lasted_s = sum(one.seconds + one.steady_s for one in found[:4])
    assert result.lists > 100 * lasted_s
