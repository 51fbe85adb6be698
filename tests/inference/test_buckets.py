"""Cuts, retrieval and lookup: the arithmetic around the engine."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.encoding import Vocabulary
from inference.buckets import Buckets, fit
from inference.engines.base import Shape
from inference.lookup import ItemLookup
from inference.retrieval import RetrievalIndex


@given(lengths=st.lists(st.integers(0, 130), max_size=90))
def test_every_user_is_in_one_cut_that_is_long_enough(lengths: list[int]) -> None:
    buckets = Buckets()
    cuts = buckets.cuts(np.array(lengths, np.int64))
    assert sorted(user for cut in cuts for user in cut.users.tolist()) == list(range(len(lengths)))
    for cut in cuts:
        assert 1 <= len(cut.users) <= cut.batch
        assert cut.batch in buckets.batches
        assert cut.history in buckets.histories
        assert all(min(lengths[user], buckets.histories[-1]) <= cut.history for user in cut.users)


def measured(per_slot: float, per_call: float) -> Buckets:
    sizes = Buckets((4, 100), (50,), (1, 2, 4, 8))
    return sizes.with_costs(
        {shape: per_call + per_slot * shape.batch * shape.history for shape in sizes.shapes()}
    )


def test_what_was_measured_decides_whether_short_histories_travel_alone() -> None:
    lengths = np.array([2, 3, 100, 1])
    assert [cut.history for cut in measured(1e-4, 1e-5).cuts(lengths)] == [4, 4, 100]
    assert [(cut.history, cut.batch) for cut in measured(1e-9, 1.0).cuts(lengths)] == [(100, 4)]


@given(
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=12),
    costs=st.lists(st.floats(1e-6, 1e-2), min_size=24, max_size=24),
)
def test_no_other_length_to_cut_at_costs_less(lengths: list[int], costs: list[float]) -> None:
    sizes = Buckets((4, 10, 25), (50,), (1, 2, 4))
    buckets = sizes.with_costs(dict(zip(sizes.shapes(), costs, strict=False)))
    cost = sum(buckets.cost(cut.batch, cut.history) for cut in buckets.cuts(np.array(lengths)))

    @cache
    def split(users: int, history: int) -> float:
        after = (
            buckets.cost(batch, history) + split(max(0, users - batch), history) for batch in buckets.batches
        )
        return min(after) if users else 0.0

    ways = []
    for count in range(3):
        for kept in combinations((4, 10), count):
            ends = [sum(length <= history for length in lengths) for history in kept] + [len(lengths)]
            ways.append(sum(map(split, np.diff([0, *ends]).tolist(), (*kept, 25))))
    assert cost == pytest.approx(min(ways))


def test_the_shapes_are_every_combination_and_stop_at_what_a_model_takes() -> None:
    shapes = set(Buckets((4, 10), (50, 200), (1, 2)).shapes())
    assert len(shapes) == 2 * 2 * (1 + 2)
    assert Shape("score", 2, 10, 200) in shapes
    assert Buckets((4, 10, 25, 50)).up_to(30).histories == (4, 10, 25, 30)
    assert Buckets((4, 10)).up_to(3).histories == (3,)


@pytest.mark.parametrize("sizes", [(), (2, 1), (0, 1), (3, 3)])
def test_sizes_that_do_not_ascend_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascend"):
        Buckets(histories=sizes)


def test_fit_is_the_smallest_that_holds_or_the_largest_there_is() -> None:
    assert [fit((4, 10), needed) for needed in (0, 4, 5, 10, 11)] == [4, 4, 10, 10, 10]


def test_exact_retrieval_is_the_sorted_product_and_lists_find_most_of_it() -> None:
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(40, 16))
    vectors = (centres[rng.integers(0, 40, 5_000)] + 0.3 * rng.normal(size=(5_000, 16))).astype(np.float32)
    users = (centres[rng.integers(0, 40, 32)]).astype(np.float32)
    ids = np.arange(5_000, dtype=np.int64) * 3 + 7
    best = ids[np.argsort(-(users @ vectors.T), axis=1)[:, :20]]
    found, scores = RetrievalIndex.build(ids, vectors).search(users, 20)
    assert (np.sort(found) == np.sort(best)).mean() > 0.999
    assert (np.diff(scores) <= 0).all()
    near, _ = RetrievalIndex.build(ids, vectors, exact_until=100, probes=8).search(users, 20)
    recall = np.mean(
        [len(set(ours) & set(theirs)) / 20 for ours, theirs in zip(near.tolist(), best.tolist(), strict=True)]
    )
    assert recall > 0.9
    again, _ = RetrievalIndex.build(ids, vectors, exact_until=100, probes=8).search(users, 20)
    assert np.array_equal(near, again), "the same in every process"


def test_retrieval_from_fewer_items_than_asked_or_none_is_shorter() -> None:
    users = np.ones((2, 4), np.float32)
    found, _ = RetrievalIndex.build(np.array([5, 9]), np.eye(2, 4, dtype=np.float32)).search(users, 100)
    assert np.sort(found).tolist() == [[5, 9], [5, 9]]
    found, scores = RetrievalIndex.build(np.empty(0, np.int64), np.empty((0, 4), np.float32)).search(
        users, 100
    )
    assert found.shape == scores.shape == (2, 0)


@pytest.mark.parametrize("ids", [[3, 5, 8, 13], [0, 2**62], []], ids=["dense", "sparse", "empty"])
@given(asked=st.lists(st.one_of(st.integers(0, 20), st.integers(0, 2**63 - 1)), max_size=20))
def test_lookup_answers_as_the_vocabulary_does(ids: list[int], asked: list[int]) -> None:
    words = Vocabulary(
        np.array(ids, np.int64),
        np.arange(1, len(ids) + 1, dtype=np.int32),
        np.arange(4, dtype=np.int64),
        8,
        3,
    )
    lookup, items = ItemLookup(words), np.array([*asked, *ids], np.int64)
    rows = lookup.rows(items)
    assert np.array_equal(rows, words.item_rows_of(items))
    assert np.array_equal(lookup.categories_of_rows(rows), words.category_rows_of_items(items))
    known = words.is_known(items)
    assert np.array_equal(lookup.capped_categories(items) < 0, ~known)
