"""A version that scores by vector and keeps keys and values: a click is one appended event, whoever asks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compression.releases.registry import Registry
from features.encoding import encode_histories
from features.sequence import unpack
from features.statistics import ItemStatistics
from inference import engines, metrics
from inference.engines.base import Shape
from inference.histories import COLUMNS, Packed, Sent
from inference.oip.graph_models import GraphSet
from inference.oip.models import Question
from inference.types import Tensors
from inference.user_cache import UserCache
from tests.inference import retrieval_version
from tests.inference.conftest import MAX_HISTORY, vocabulary
from tests.inference.oip.conftest import INFERENCE
from tests.inference.test_user_cache import EXACT, OUTCOMES, Spy, Version, ask, events, packed

NAME = "20260404T000000-one"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("appended") / "models"
    retrieval_version.publish(folder, NAME, retrieval_version.ONE)
    Registry(folder).promote(NAME)
    return folder


@pytest.fixture
def outcomes() -> Iterator[Any]:
    before = [metrics.cache_users(outcome)._value.get() for outcome in OUTCOMES]
    yield lambda: {
        outcome: int(metrics.cache_users(outcome)._value.get() - old)
        for outcome, old in zip(OUTCOMES, before, strict=True)
    }


def test_growing_histories_score_as_if_each_were_encoded_whole(
    root: Path, statistics: ItemStatistics, outcomes: Any
) -> None:
    rng, users = np.random.default_rng(5), 200
    hop = MAX_HISTORY // 2
    cached, plain = (Version(root, cache_mb=cache_mb, hop=hop) for cache_mb in (16.0, 0.0))
    made, ends = events(rng, (users, MAX_HISTORY + 40)), rng.integers(0, MAX_HISTORY, users)
    for _ in range(12):
        ends = np.minimum(ends + rng.choice(3, users, p=[0.2, 0.6, 0.2]), MAX_HISTORY + 40)
        requests = [
            ask(user, made[user, max(0, ends[user] - MAX_HISTORY) : ends[user]]) for user in range(users)
        ]
        scores = cached.scores(requests, statistics)
        assert np.abs(scores - plain.scores(requests, statistics)).max() <= EXACT
    counted = outcomes()
    assert counted["append"] > 6 * users and counted["hit"] > users, counted


def test_a_click_is_appended_and_an_ask_again_is_scored_alone(root: Path, statistics: ItemStatistics) -> None:
    version = Version(root)
    made, seen = events(np.random.default_rng(1), 40), Spy(version)
    for end, graphs in (
        (30, ["encode", "score"]),
        (30, ["score"]),
        (31, ["append", "score"]),
        (31, ["score"]),
        (40, ["encode", "score"]),
    ):
        seen.graphs.clear()
        version.rank([ask(1, made[:end])], statistics)
        assert seen.graphs == graphs


def test_an_ask_again_writes_nothing_to_the_cache(
    root: Path, statistics: ItemStatistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of this kind are a product each: none are remembered."""
    version = Version(root)
    made, keep = events(np.random.default_rng(2), 30), UserCache.keep
    kept: list[list[int]] = []

    def spy(cache: UserCache, users: list[int], *rest: Any) -> None:
        kept.append(users)
        keep(cache, users, *rest)

    monkeypatch.setattr(UserCache, "keep", spy)
    for end in (29, 29, 30, 30):
        version.rank([ask(1, made[:end])], statistics)
    assert kept == [[1], [1]]


def sent(made: np.ndarray, candidates: np.ndarray) -> Tensors:
    """Histories [users, events] as a client of the graph sends them."""
    histories = unpack([packed(one) for one in made])
    slots = int(histories.lengths.max())
    rng = np.random.default_rng(8)
    return {
        **encode_histories(histories, vocabulary(), slots).tensors(),
        "candidates": candidates,
        "candidate_categories": rng.integers(1, 5, candidates.shape).astype(np.int32),
    }


async def test_a_client_that_names_nobody_has_its_histories_appended_to(root: Path, outcomes: Any) -> None:
    """And they are compared whole: who begins alike and goes on otherwise gets scores of their own."""
    settings = INFERENCE.model_copy(update={"cache_mb": 4.0})
    graphs = await asyncio.to_thread(GraphSet.open, root, NAME, settings)
    engine = engines.create("onnx")
    engine.load(Registry(root).open(), ("rank",))
    rng, users = np.random.default_rng(21), 6
    made = events(rng, (users, 40))
    made[1] = made[0]
    made["item"][1, 12:] = made["item"][2, 12:]
    made[3, :5] = made[2, :5]
    rank = graphs.models[2]
    try:
        for end in (*range(5, 14), 20, 21, 22, 22, 40):
            asked = sent(made[:, :end], rng.integers(1, 100, (users, 8)).astype(np.int32))
            answer = (await rank.infer(Question(asked, ("scores", "user_vector")))).outputs
            for name, expected in engine.run("rank", asked).items():
                np.testing.assert_allclose(answer[name], expected, atol=EXACT)
    finally:
        await graphs.close()
    counted = outcomes()
    assert counted["append"] >= 5 * (users - 1) and counted["hit"] >= users - 1, counted


async def test_without_room_clients_get_the_same(root: Path, outcomes: Any) -> None:
    settings = INFERENCE.model_copy(update={"cache_mb": 0.0})
    graphs = await asyncio.to_thread(GraphSet.open, root, NAME, settings)
    engine = engines.create("onnx")
    engine.load(Registry(root).open(), ("rank",))
    given = engine.example(Shape("rank", 3, 10, 8))
    try:
        answer = (await graphs.models[2].infer(Question(given, ("scores",)))).outputs
        np.testing.assert_allclose(answer["scores"], engine.run("rank", given)["scores"], atol=EXACT)
    finally:
        await graphs.close()
    assert not any(outcomes().values())


def test_what_clients_send_is_what_the_stream_has() -> None:
    """Either kind of histories gives the same arrays, events and order."""
    made = events(np.random.default_rng(4), (5, 30))
    requests = [ask(user, made[user, : 6 * user]) for user in range(5)]
    histories = unpack([request.sequence for request in requests])
    stream = Packed(requests, histories, vocabulary())
    client = Sent(encode_histories(histories, vocabulary(), 30).tensors())
    assert stream.lengths.tolist() == client.lengths.tolist() == [0, 6, 12, 18, 24]
    some = np.array([1, 3])
    for one, other in ((stream, client), (stream.of(some), client.of(some))):
        ours, theirs = one.arrays(25).tensors(), other.arrays(25).tensors()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
        places = one.lengths[-2:] - 1
        users = np.arange(len(one.lengths))[-2:]
        ours, theirs = one.events(users, places), other.events(users, places)
        assert all(np.array_equal(ours[name], theirs[name]) for name in COLUMNS)
    kept = client.keys()
    assert [len(key) > 0 for key in kept] == [False, False, True, True, True]
