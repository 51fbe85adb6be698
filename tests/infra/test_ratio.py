"""The ratio of two percentiles, and its interval over rounds."""

from __future__ import annotations

import numpy as np
import pytest

from infra.bench.ratio import Ratio

RNG = np.random.default_rng(5)


def drawn(rounds: int, scale: float, spread: float = 0.3) -> list[np.ndarray]:
    """Rounds that differ among each other by more than their requests do."""
    return [
        scale * RNG.lognormal(0, spread) * RNG.exponential(1.0, int(RNG.integers(200, 400)))
        for _ in range(rounds)
    ]


def test_the_same_twice_is_one():
    rounds = drawn(5, 1.0)
    assert Ratio.of(rounds, rounds) == Ratio(1.0, 1.0, 1.0, (1.0,) * 5)


def test_what_is_twice_as_slow_is_found_and_told_from_one():
    found = Ratio.of(drawn(60, 2.0), drawn(60, 1.0))
    assert 1.0 < found.low < 2.0 < found.high
    assert found.median_round == pytest.approx(2.0, rel=0.3)


def test_the_interval_is_that_of_rounds_not_of_requests():
    def width(rounds: int) -> float:
        found = Ratio.of(drawn(rounds, 1.0), drawn(rounds, 1.0))
        return found.high - found.low

    # As many requests in fewer rounds say less.
    long = [np.concatenate(drawn(10, 1.0, 0.0)) * RNG.lognormal(0, 0.5) for _ in range(12)]
    few = Ratio.of(long[:6], long[6:])
    assert few.high - few.low > 2 * width(60)


def test_an_answer_that_never_came_is_left_to_others():
    rounds = drawn(4, 1.0)
    gaps = [np.append(part, np.nan) for part in rounds]
    assert Ratio.of(gaps, rounds).value == 1.0


def test_a_round_without_requests_is_none():
    with pytest.raises(ValueError, match="both kinds"):
        Ratio.of([np.ones(3), np.empty(0)], [np.ones(3), np.ones(3)])
    with pytest.raises(ValueError, match="both kinds"):
        Ratio.of([np.ones(3)], [np.ones(3), np.ones(3)])
