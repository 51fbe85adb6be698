"""How far two lists are apart."""

from __future__ import annotations

import math

import pytest

from inference.errors import EngineFailed, Overloaded
from inference.releases.comparison import Comparison, Sample, difference
from inference.types import RankedList, RankRequest


def ranked(items, scores=None):
    scores = scores or [1.0 / (place + 1) for place in range(len(items))]
    return RankedList(list(items), scores, ["retrieval"] * len(items), "v1", "fake")


@pytest.mark.parametrize(
    ("one", "other", "overlap", "correlation"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0, 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], 1.0, -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 1.0, 0.8),
        ([1, 2, 3, 4], [5, 6, 7, 8], 0.0, None),
        ([1, 2, 3, 4], [9, 1, 2, 3], 0.75, 1.0),
        ([1, 2], [1, 2, 3, 4], 0.5, None),
        ([], [], 1.0, None),
        ([], [1], 0.0, None),
    ],
)
def test_overlap_and_rank_correlation(one, other, overlap, correlation):
    found = difference(ranked(one), ranked(other))
    assert found.overlap == pytest.approx(overlap)
    assert (
        math.isnan(found.correlation)
        if correlation is None
        else found.correlation == pytest.approx(correlation)
    )


def test_the_largest_score_difference_is_that_of_common_items():
    found = difference(ranked([1, 2, 3], [1.0, 0.5, 0.2]), ranked([2, 1, 4], [0.4, 0.3, 99.0]))
    assert found.score == pytest.approx(0.7)


def test_what_must_not_be_is_counted_apart_from_what_differs():
    sample = Sample(RankRequest(1, None, k=3), ranked([1, 2, 3]))
    seen = Comparison()
    answers = [
        ranked([7, 8, 9]),
        ranked([1, 2]),
        ranked([1, 2, 3], [1.0, float("nan"), 0.1]),
        EngineFailed("x"),
        Overloaded("busy"),
    ]
    seen.add([sample] * 5, answers, 0.002)
    assert (seen.compared, seen.short, seen.failed, seen.busy) == (2, 1, 2, 1)


def test_a_list_that_was_short_may_stay_short():
    sample = Sample(RankRequest(1, None, k=100), ranked([1, 2, 3]))
    seen = Comparison()
    seen.add([sample], [ranked([1])], 0.002)
    assert (seen.compared, seen.short) == (1, 0)
