"""Where a full history starts follows from its events, and mostly stays where it was."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.anchor import anchors, from_anchors
from features.sequence import SequenceBatch

LONGEST = 100


def clicks(rng: np.random.Generator, count: int, items: int = 50_000) -> SequenceBatch:
    """One user's."""
    return batch([(rng.integers(1, items, count), 1_700_000_000 + np.cumsum(rng.integers(1, 4_000, count)))])


def batch(users: list[tuple[np.ndarray, np.ndarray]]) -> SequenceBatch:
    items = np.concatenate([one for one, _ in users]).astype(np.int64)
    times = np.concatenate([other for _, other in users]).astype(np.int64)
    return SequenceBatch(
        np.array([len(one) for one, _ in users], np.int64), items, items % 7, items % 4, times
    )


def window(whole: SequenceBatch, end: int) -> SequenceBatch:
    """The hundred events up to one of a user's."""
    start = max(0, end - LONGEST)
    return batch([(whole.items[start:end], whole.timestamps[start:end])])


@pytest.mark.parametrize(("hop", "least"), [(50, 20.0), (25, 10.0)])
def test_a_click_seldom_moves_the_start_of_a_full_history(hop: int, least: float) -> None:
    """Of n + 1 events that may be the start, after one click in (n + 1) / 2 it is another."""
    whole = clicks(np.random.default_rng(1), 5_000)
    starts = [
        end - LONGEST + int(anchors(window(whole, end), LONGEST, hop)[0]) for end in range(LONGEST, 5_000)
    ]
    assert (np.diff(starts) >= 0).mean() == 1.0
    moves = int((np.diff(starts) > 0).sum())
    assert len(starts) / moves > least


def test_items_that_come_back_are_told_apart_by_their_time() -> None:
    rng = np.random.default_rng(2)
    whole = clicks(rng, 3_000, items=4)
    starts = [
        end - LONGEST + int(anchors(window(whole, end), LONGEST, 50)[0]) for end in range(LONGEST, 3_000)
    ]
    assert len(starts) / int((np.diff(starts) > 0).sum()) > 20


@given(st.lists(st.integers(0, 140), min_size=1, max_size=6), st.integers(0, 50), st.integers(0, 2**32 - 1))
def test_the_newest_events_stay_and_nobody_else_matters(lengths: list[int], hop: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    users = [(rng.integers(1, 10**12, n), np.sort(rng.integers(0, 2**32, n))) for n in lengths]
    together = from_anchors(batch(users), LONGEST, hop)
    ends = np.cumsum(together.lengths)
    for place, (items, times) in enumerate(users):
        alone = from_anchors(batch([(items, times)]), LONGEST, hop)
        mine = together.items[ends[place] - together.lengths[place] : ends[place]]
        assert mine.tolist() == alone.items.tolist() == items[len(items) - len(mine) :].tolist()
        if len(items) < LONGEST or not hop:
            assert len(mine) == len(items)
        else:
            assert LONGEST - hop <= len(mine) <= LONGEST


def test_a_batch_of_short_histories_is_left_as_it_is() -> None:
    some = clicks(np.random.default_rng(3), LONGEST - 1)
    assert from_anchors(some, LONGEST, 50) is some
