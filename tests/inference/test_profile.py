"""What a lane's batches are predicted to take after very many of them."""

from __future__ import annotations

import numpy as np
import pytest

from inference.profile import LatencyProfile

COST_S = {1: 1e-3, 8: 2e-3, 32: 4e-3}


def worked(batches: int, spread: float = 0.5) -> LatencyProfile:
    """A lane that has had so many batches of one and of eight, which took what they cost, more or less."""
    profile, rng = LatencyProfile(COST_S), np.random.default_rng(5)
    sizes = rng.choice([1, 8], batches)
    for size, noise in zip(sizes.tolist(), np.exp(rng.normal(0.0, spread, batches)).tolist(), strict=True):
        profile.observe(size, COST_S[size] * noise)
    return profile


@pytest.mark.parametrize("batches", [1_000, 50_000])
def test_however_many_batches_there_were_each_size_is_predicted_at_what_it_takes(batches):
    """Of 32 there was none: shares of what was too long or too short had made it 70 times as fast by 10,000
    batches, and every size endless by three million, so that no lane was chosen."""
    profile = worked(batches)
    for size, cost_s in COST_S.items():
        assert cost_s / 2 < profile.predict(size) < 2 * cost_s
    assert 0.5 < profile.scale < 2


def test_a_lane_with_a_new_engine_is_expected_to_be_no_slower_than_before():
    profile = worked(1_000, spread=0.1)
    for _ in range(50):
        profile.observe(1, COST_S[1] / 4)
    before_s = profile.predict(1)
    profile.restart()
    assert profile.predict(1) <= before_s
    for _ in range(50):
        profile.observe(1, 40 * COST_S[1])
    assert profile.predict(1) > 20 * COST_S[1]
    profile.restart()
    assert profile.predict(1) < 5 * COST_S[1]
