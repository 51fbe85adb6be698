"""What `bench swap` says about memory and latency from swap to swap."""

from __future__ import annotations

import numpy as np
import pytest

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
