"""Who goes first, and when what comes after may start, on a clock of the test's own."""

from __future__ import annotations

import pytest

from inference.precedence import Precedence

TOP, LOWER = 3, 9


def test_the_highest_level_is_the_highest_that_came_within_a_second():
    precedence = Precedence()
    precedence.came(TOP, 10.0)
    precedence.came(LOWER, 10.9)
    assert precedence.top(10.95, LOWER) == TOP
    assert precedence.precedes(TOP, 10.95) and not precedence.precedes(LOWER, 10.95)
    assert precedence.top(11.05, LOWER) == LOWER


def test_what_is_below_leaves_one_lane_free():
    assert Precedence().below_at_s([LOWER], TOP, 2, 5.0) is None
    assert Precedence().below_at_s([LOWER], TOP, 3, 5.0) == 5.0


def test_what_is_below_lets_the_highest_level_be_ranked_first_but_not_for_long():
    precedence = Precedence()
    until_s = precedence.below_at_s([TOP], TOP, 2, 5.0)
    assert until_s == pytest.approx(5.005)
    assert precedence.below_at_s([TOP], TOP, 2, 5.004) == until_s
    assert precedence.below_at_s([TOP], TOP, 2, 5.005) <= 5.005
    assert precedence.below_at_s([TOP], TOP, 2, 6.0) == pytest.approx(6.005)


def test_a_wait_that_was_in_vain_is_forgotten():
    precedence = Precedence()
    precedence.below_at_s([TOP], TOP, 2, 5.0)
    assert precedence.below_at_s([], TOP, 2, 5.001) == 5.001
    assert precedence.below_at_s([TOP], TOP, 2, 5.002) == pytest.approx(5.007)
