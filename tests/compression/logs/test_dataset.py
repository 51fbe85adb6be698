"""Sequences and splits: nothing to be predicted is ever learnt from."""

from collections import deque

import numpy as np
import pytest

from compression.logs.dataset import (
    batches,
    build_vocabulary,
    leave_one_out,
    prefix_windows,
    read_log,
    temporal,
    to_sequences,
    training_windows,
)
from compression.logs.log_reader import EventChunk
from compression.logs.synth import SynthSettings, synthesize, write_log


def sequences(*events):
    """Events as (user, item, timestamp), in file order; an item's category is a tenth of it."""
    users, items, stamps = np.array(events, np.int64).T
    zeros = np.zeros_like(users)
    return to_sequences(deque([EventChunk(users, items, items // 10, zeros, stamps, zeros)]))


def test_users_are_gathered_and_their_events_ordered_by_time_then_by_file():
    ours = sequences((2, 20, 5), (1, 10, 9), (1, 11, 3), (2, 21, 5), (1, 12, 9))
    assert ours.users.tolist() == [1, 2]
    assert ours.offsets.tolist() == [0, 3, 5]
    assert ours.items.tolist() == [11, 10, 12, 20, 21]
    assert ours.user_of(np.array([0, 2, 3, 4])).tolist() == [0, 0, 1, 1]


def test_history_before_an_event_holds_neither_the_event_nor_other_users():
    ours = sequences(*[(1, n, n) for n in range(5)], *[(2, 10 + n, n) for n in range(3)])
    batch = ours.before(np.array([0, 4, 7]), 3)
    assert batch.lengths.tolist() == [0, 3, 2]
    assert batch.items.tolist() == [1, 2, 3, 10, 11]


def test_leave_one_out_keeps_the_last_two_events_out_of_training():
    ours = sequences(*[(1, n, n) for n in range(4)], (2, 20, 1), (2, 21, 2), *[(3, n, n) for n in range(3)])
    split = leave_one_out(ours)
    assert split.test.tolist() == [3, 8]
    assert split.validation.tolist() == [2, 7]
    assert split.train_positions(ours).tolist() == [0, 1, 4, 5, 6]


def test_a_temporal_split_learns_only_from_before_what_it_is_asked():
    ours = sequences(*[(n % 7, n % 13, 1000 + n) for n in range(200)], (99, 5, 1199))
    split = temporal(ours)
    train, stamps = split.train_positions(ours), ours.timestamps
    assert stamps[train].max() < stamps[split.validation].min() <= stamps[split.validation].max()
    assert stamps[split.validation].max() < stamps[split.test].min()
    assert 15 <= len(split.test) <= 22
    # A user's first event has nothing before it to predict it from.
    assert not set(split.test.tolist()) & set(ours.offsets.tolist())


def test_windows_predict_every_training_event_but_each_first_exactly_once():
    rng = np.random.default_rng(1)
    lengths = [1, 2, 5, 11, 12, 64, 250]
    ours = sequences(*[(u, n, n) for u, length in enumerate(lengths) for n in range(length)])
    for _ in range(20):
        starts, ends = training_windows(ours, ours.offsets[1:], 10, rng)
        assert ((ends - starts >= 2) & (ends - starts <= 11)).all()
        assert (ours.user_of(starts) == ours.user_of(ends - 1)).all()
        asked = np.sort(np.concatenate([np.arange(s + 1, e) for s, e in zip(starts, ends, strict=True)]))
        assert asked.tolist() == [n for n in range(len(ours)) if n not in ours.offsets]


def test_every_training_event_but_each_first_ends_a_prefix_of_its_own():
    lengths = [1, 2, 5, 30]
    ours = sequences(*[(u, n, n) for u, length in enumerate(lengths) for n in range(length)])
    trained_to = ours.offsets[1:] - [0, 0, 2, 1]
    starts, ends = prefix_windows(ours, trained_to, 10)
    first = ours.offsets[:-1][ours.user_of(ends - 1)]
    assert ends.tolist() == [3, *range(5, 7), *range(10, 38)]
    assert starts.tolist() == np.maximum(first, ends - 11).tolist()


def test_batches_hold_every_window_once():
    rng = np.random.default_rng(1)
    starts = np.arange(23)
    got = [
        pair for s, e in batches(starts, starts + 1 + starts % 5, 4, rng) for pair in zip(s, e, strict=True)
    ]
    assert sorted(s for s, _ in got) == starts.tolist()
    assert all(e == s + 1 + s % 5 for s, e in got)


def test_a_long_log_keeps_its_last_rows(tmp_path):
    path = tmp_path / "log.csv"
    write_log(path, synthesize(SynthSettings(200_000, 1_000, 500, 10)))
    log = read_log(path, max_events=20_000)
    assert log.report.rows == 200_000
    assert len(log.sequences) + log.left_out == 200_000
    assert 20_000 <= len(log.sequences) < 200_000
    whole = read_log(path).sequences
    assert log.sequences.timestamps.max() == whole.timestamps.max()
    assert log.sequences.timestamps.min() > whole.timestamps.min()


def test_the_vocabulary_keeps_the_most_frequent_items():
    ours = sequences((1, 10, 1), (1, 20, 2), (1, 20, 3), (1, 31, 4), (2, 31, 5), (2, 31, 6))
    full = build_vocabulary(ours, max_items=10, item_buckets=4, category_buckets=3)
    assert full.item_ids.tolist() == [10, 20, 31]
    assert full.category_ids[full.item_categories - 1].tolist() == [1, 2, 3]
    small = build_vocabulary(ours, max_items=2, item_buckets=4, category_buckets=3)
    assert small.item_ids.tolist() == [20, 31]
    assert small.is_known(np.array([10, 20])).tolist() == [False, True]


@pytest.mark.parametrize("count", [1, 2])
def test_users_too_short_to_judge_by_are_trained_on(count):
    ours = sequences(*[(1, n, n) for n in range(count)])
    split = leave_one_out(ours)
    assert len(split.test) == 0
    assert split.train_positions(ours).tolist() == list(range(count))
