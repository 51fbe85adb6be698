"""Transition counts by their formula, fusion, and ranks with and without what the user has seen."""

from pathlib import Path

import numpy as np
import pytest

from compression.evaluation.catalogue import catalogue_ranks
from compression.evaluation.neighbours import Neighbours
from compression.evaluation.predictors import Statistics, Transitions, fused, remembered
from compression.evaluation.targets import Targets, metrics
from compression.evaluation.transitions import (
    COMBINED,
    COUNTS,
    DENSE,
    SPARSE,
    WALKED,
    TransitionCounts,
    TransitionSettings,
)
from compression.logs.dataset import build_vocabulary, leave_one_out, read_log

MOVIES = Path(__file__).parents[3] / "shared" / "data" / "ml-1m" / "ml-1m.txt.gz"
BEAUTY = Path(__file__).parents[3] / "shared" / "data" / "amazon-beauty" / "Beauty.txt.gz"


def by_the_formula(sequences, catalogue, settings, history):
    counts = np.zeros((catalogue + 1, catalogue + 1))
    often, late = np.zeros(catalogue + 1), np.zeros(catalogue + 1)
    for items in sequences:
        for later, item in enumerate(items):
            often[item] += 1
            late[item] += later >= len(items) - 3
            once = 1.0
            if settings.recency < 1:
                once = max(0.2, settings.recency ** (len(items) - 1 - later))
            for earlier in range(max(0, later - settings.window), later):
                counts[items[earlier], item] += once * (later - earlier) ** -settings.distance_power
    both = counts + counts.T
    steps = both / np.maximum(both.sum(1, keepdims=True), 1e-12)
    scores = settings.boost * np.log((often + 1) / (often.sum() + catalogue))
    newest = history[::-1][: settings.max_history]
    for weight, item in zip(settings.kernel(len(newest)), newest, strict=True):
        scores += weight * np.log1p(counts[item] * catalogue / settings.tau)
    start = np.zeros(catalogue + 1)
    np.add.at(start, newest, settings.kernel(len(newest)))
    scores += settings.walk * np.log1p(start @ steps @ steps * catalogue / settings.walk_tau)
    alike = np.zeros(catalogue + 1)
    for items in sequences:
        shared = sum(
            0.8**age * max(0.0, np.log(len(sequences) / (1 + often[item]))) * (items == item).sum()
            for age, item in enumerate(newest)
        )
        np.add.at(alike, items, shared / np.sqrt(1 + len(items)))
    scores += settings.neighbours * np.log1p(3 * alike)
    if settings.trend:
        scores += settings.trend * np.log((late + 30 * late.sum() / often.sum()) / (often + 30))
    return scores[1:]


@pytest.mark.parametrize(
    "settings", [DENSE, SPARSE, WALKED, COMBINED, TransitionSettings(window=3, head=2, max_history=4)]
)
def test_counts_score_as_the_formula_says(settings):
    rng = np.random.default_rng(5)
    sequences = [rng.integers(1, 13, length) for length in (1, 2, 9, 30)]
    rows = np.concatenate(sequences)
    users = np.repeat(np.arange(4), [len(one) for one in sequences])
    counts = TransitionCounts(rows, users, 12, settings)
    histories = [sequences[2], np.array([], np.int64), sequences[3]]
    scores = counts.scores(histories)
    for got, history in zip(scores, histories, strict=True):
        assert got == pytest.approx(by_the_formula(sequences, 12, settings, history), abs=1e-4)


def test_a_walk_reaches_an_item_that_never_met_the_history():
    rows, users = np.array([1, 2, 3, 2]), np.array([0, 0, 1, 1])
    without, walked = (
        TransitionCounts(rows, users, 4, TransitionSettings(boost=0.0, walk=walk)).scores([np.array([1])])[0]
        for walk in (0.0, 1.0)
    )
    assert without[2] == 0.0
    # From 1 the first step is to 2, the second from there to 1 or 3, which met 2 once each.
    assert walked - without == pytest.approx([np.log1p(0.5 * 4 / 5), 0, np.log1p(0.5 * 4 / 5), 0])


def test_neighbours_offer_what_else_they_had_and_nobody_is_his_own():
    rows, users = np.array([1, 2, 1, 3, 4, 5]), np.array([0, 0, 1, 1, 2, 2])
    neighbours = Neighbours(rows, users, 5)
    rare = np.log(3 / (1 + 2)), np.log(3 / (1 + 1))
    history = np.array([2, 1])
    scores = neighbours.scores([history, history], np.array([2, 0]))
    # User 0 had both, user 1 the common one alone, which is worth nothing; user 2 had neither.
    likeness = (rare[1] + 0.8 * rare[0]) / np.sqrt(3)
    assert scores[0] == pytest.approx([0, np.log1p(3 * likeness), np.log1p(3 * likeness), 0, 0, 0], abs=1e-6)
    assert scores[1] == pytest.approx(np.zeros(6), abs=1e-6)
    assert neighbours.scores([np.array([], np.int64)]) == pytest.approx(np.zeros((1, 6)))


def test_a_trend_favours_what_came_last():
    rows, users = np.array([1, 1, 2, 3, 4, 1, 2, 3, 4]), np.array([0, 0, 0, 0, 0, 1, 1, 1, 1])
    without, trending = (
        TransitionCounts(rows, users, 4, TransitionSettings(trend=trend)).scores([np.array([], np.int64)])[0]
        for trend in (0.0, 1.0)
    )
    gained = trending - without
    assert gained == pytest.approx(
        np.log((np.array([0, 2, 2, 2]) + 30 * 6 / 9) / (np.array([3, 2, 2, 2]) + 30))
    )
    assert gained[0] < gained[1]


def test_the_kernel_gives_all_to_the_newest_where_there_is_nothing_older():
    settings = TransitionSettings(head=3, recent_mass=0.8, decay=0.5)
    assert settings.kernel(2) == pytest.approx([2 / 3, 1 / 3])
    assert settings.kernel(5) == pytest.approx([0.8 * 4 / 7, 0.8 * 2 / 7, 0.8 / 7, 0.1, 0.1])


def test_what_was_seen_is_not_ranked_and_is_a_miss_where_it_is_the_target():
    targets = Targets(np.array([0, 1]), np.array([2, 3]))

    def scores(positions):
        return np.tile(np.array([5.0, 3.0, 4.0, 1.0], np.float32), (len(positions), 1))

    assert catalogue_ranks(scores, targets, 4).tolist() == [3, 2]
    seen = {0: np.array([1]), 1: np.array([3])}
    filtered = catalogue_ranks(scores, targets, 4, lambda position: seen[position])
    assert filtered[0] == 2
    assert metrics(filtered, (4,))["hr@4"] == 0.5


def test_a_fusion_adds_the_counts_to_the_log_of_the_models_chances():
    logits = np.array([[1.0, 2.0, 0.0]], np.float32)
    counts = np.array([[0.0, 0.0, 3.0]], np.float32)
    scores = fused(lambda _: logits.copy(), lambda _: counts, 2.0)(np.array([0]))
    assert scores == pytest.approx(np.log(np.exp(logits) / np.exp(logits).sum()) + 2 * counts, abs=1e-5)


def test_what_is_remembered_is_worked_out_once_and_may_be_written_to():
    asked = []

    def scores(positions):
        asked.append(positions)
        return positions[:, None].astype(np.float32)

    once, first, other = remembered(scores), np.array([1, 2]), np.array([1, 2])
    once(first)[:] = -1.0
    assert once(first).tolist() == [[1], [2]] and len(asked) == 1
    assert once(other).tolist() == [[1], [2]] and asked[1] is other


@pytest.mark.parametrize(
    ("path", "settings", "ndcg", "hr"), [(MOVIES, "dense", 0.1811, 0.304), (BEAUTY, "sparse", 0.0554, 0.0875)]
)
def test_published_settings_give_the_published_figures(path, settings, ndcg, hr):
    """Leave-one-out, full catalogue, seen filtered, counted without the last two items of a user."""
    if not path.is_file():
        pytest.skip(f"{path} is not there: MovieLens-1M as SASRec, Beauty as S3Rec prepared it")
    sequences = read_log(path).sequences
    vocabulary = build_vocabulary(sequences, max_items=50_000, item_buckets=1, category_buckets=2)
    split = leave_one_out(sequences)
    statistics = Statistics(sequences, split, vocabulary)
    counts = Transitions(statistics, COUNTS[settings])
    targets = Targets.draw(sequences, split.test, vocabulary, limit=100_000, seed=1)
    ranks = catalogue_ranks(counts.scores, targets, len(vocabulary.item_ids), statistics.seen)
    figures = metrics(ranks, (10,))
    assert figures["ndcg@10"] == pytest.approx(ndcg, abs=0.0006)
    assert figures["hr@10"] == pytest.approx(hr, abs=0.001)
