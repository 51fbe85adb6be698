"""Which weights of the online counts a retraining chooses."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from compression.evaluation.fusion import LEAST_GAIN, SOURCES, Lists, Trained, choose, fuse
from compression.evaluation.log_statistics import LogStatistics
from compression.logs.dataset import Sequences, build_vocabulary, leave_one_out, to_sequences
from compression.logs.log_reader import EventChunk
from features.fusion import Fusion
from features.memory_store import MemoryStore
from features.settings import FeatureSettings
from features.statistics import ItemStatistics, ItemWeights
from features.store import Append

START_S = 1_511_539_200


def sequences(events: list[tuple[int, int, int, int, int]]) -> Sequences:
    """User, item, category, behaviour and second of each event."""
    columns = [np.array(column, np.int64) for column in zip(*events, strict=True)]
    return to_sequences(deque([EventChunk(*columns, np.arange(len(events)))]))


def a_log(seed: int = 5, users: int = 30, length: int = 12, items: int = 12) -> list:
    """Of ten events eight go to the item after, one to any."""
    rng = np.random.default_rng(seed)
    events = []
    for user in range(users):
        item = int(rng.integers(items))
        for place in range(length):
            at_s = START_S + 60 * (place * users + user)
            events.append((user, 100 + item, item % 3, int(rng.integers(4)), at_s))
            item = (item + 1) % items if rng.random() < 0.8 else int(rng.integers(items))
    return sorted(events, key=lambda event: event[4])


def as_dict(weights: ItemWeights) -> dict[int, float]:
    return dict(zip(weights.items.tolist(), weights.weights.tolist(), strict=True))


async def test_statistics_of_a_log_are_those_a_worker_has_after_it() -> None:
    events = a_log()
    settings = FeatureSettings(transition_half_life_s=3600.0, popularity_half_life_s=1800.0)
    log = sequences(events)
    counted = LogStatistics(log, np.arange(len(log)), settings)
    store = MemoryStore()
    online = ItemStatistics(store, settings=settings)
    for offset, event in enumerate(events):
        appends = [Append(*event, 1, 0, offset)]
        online.needed(appends)
        appended, _ = await store.append(appends)
        online.observe(appends, appended)
    await online.flush()
    await online.refresh()
    for ids, read in (
        (sorted({event[1] for event in events}), "transitions"),
        (sorted({event[2] for event in events}), "categories"),
    ):
        names = [f"{read[0]}:{{{id_}}}" for id_ in ids]
        online.absorb(names, await store.neighbours(names, online.limit))
        for ours, theirs in zip(getattr(counted, read)(ids), getattr(online, read)(ids), strict=True):
            assert len(ours) > 0
            assert as_dict(ours) == pytest.approx(as_dict(theirs), rel=1e-4)
    assert as_dict(counted.popular()) == pytest.approx(as_dict(online.popular()), rel=1e-4)
    assert [len(none) for none in counted.transitions([99_999])] == [0]


def some_lists(**evidence: np.ndarray) -> Lists:
    """Forty lists of 20 whose network says nothing of use: the target is in a place of its own choice."""
    rng = np.random.default_rng(1)
    zeros = np.zeros((40, 20), np.float32)
    return Lists(
        scores=rng.normal(size=(40, 20)).astype(np.float32),
        places=np.arange(40) % 20,
        evidence={source: evidence.get(source, zeros) for source in SOURCES},
    )


def test_a_source_that_finds_the_targets_is_weighed_and_one_that_does_not_is_left_out() -> None:
    useful = (np.arange(20) == (np.arange(40) % 20)[:, None]).astype(np.float32)
    noise = np.random.default_rng(2).normal(size=(40, 20)).astype(np.float32)
    lists = some_lists(transition=useful, popular=np.abs(noise) * 0.001)
    chosen = choose(lists)
    assert chosen.transition > 1.0
    assert chosen.recent == chosen.category == 0.0
    assert lists.ndcg(chosen) > lists.ndcg(Fusion()) + 0.3
    assert lists.ranks(Fusion(transition=1_000.0)).tolist() == [1.0] * 40
    misleading = some_lists(transition=-useful)
    assert choose(misleading) == Fusion()
    assert LEAST_GAIN > 0


def test_equal_scores_keep_the_order_of_the_candidates_and_a_target_not_among_them_is_a_miss() -> None:
    zeros = np.zeros((2, 4), np.float32)
    lists = Lists(zeros, np.array([2, -1]), dict.fromkeys(SOURCES, zeros))
    assert lists.ranks(Fusion()).tolist() == [3.0, 2.0**31]


def test_an_item_that_was_not_trained_on_stands_in_its_hash_bucket() -> None:
    log = sequences(a_log())
    vocabulary = build_vocabulary(log, max_items=1_000, item_buckets=8, category_buckets=4)
    rows = Trained(vocabulary, vocabulary.item_ids[:5])
    ids = np.append(vocabulary.item_ids, 2**40)
    assert rows.item_rows_of(ids[:5]).tolist() == [1, 2, 3, 4, 5]
    assert np.array_equal(rows.item_rows_of(ids[5:]), vocabulary.bucket_rows_of(ids[5:]))
    assert rows.known.tolist() == [True] * 5 + [False] * (len(vocabulary.item_ids) - 5)


class Blind:
    """A network that knows nothing."""

    def __init__(self, rows: int) -> None:
        self._table = np.zeros((rows, 4), np.float32)

    def item_table(self) -> np.ndarray:
        return self._table

    def user_vectors(self, histories) -> np.ndarray:
        return np.ones((len(histories.lengths), 4), np.float32)

    def rank(self, histories, candidates, categories) -> np.ndarray:
        # Worse than nothing: the order of rows, which tells nothing of what comes next.
        return -candidates.astype(np.float32)


def test_where_items_follow_one_another_the_counts_are_weighed_and_rank_the_test_better() -> None:
    log = sequences(a_log(users=120, items=80, length=20))
    vocabulary = build_vocabulary(log, max_items=1_000, item_buckets=8, category_buckets=4)
    told = fuse(Blind(vocabulary.item_rows), log, leave_one_out(log), vocabulary, max_history=50, limit=120)
    assert Fusion(**told["weights"]).transition > 0
    assert told["targets"] == 120
    assert told["fused"]["ndcg@10"] > told["network"]["ndcg@10"] + 0.1
    assert told["fused"]["hr@50"] == told["network"]["hr@50"]
