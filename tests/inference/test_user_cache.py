"""What is kept of a history changes what an ask costs, never what it answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compression.releases.registry import ModelShape, Registry
from features.anchor import anchors
from features.sequence import (
    NARROW,
    NARROW_EVENT,
    WIDE,
    newest_events,
    pack_event,
    pack_fence,
    unpack,
)
from features.statistics import ItemStatistics
from inference import metrics
from inference.derived import Derived
from inference.engines.base import Shape
from inference.errors import EngineFailed
from inference.ranker import Ranker, Warmed
from inference.settings import InferenceSettings
from inference.types import Graph, RankedList, RankRequest, Tensors
from inference.user_cache import Computed, Found, UserCache
from tests.inference.conftest import ITEMS, MAX_HISTORY, NOW_S
from topics.messages import BEHAVIORS

SETTINGS = InferenceSettings(
    engine="onnx",
    histories=(4, 10, 25, 70),
    candidate_sizes=(8, 50),
    batches=(1, 4, 32),
    retrieved=40,
    cache_mb=16,
    history_hop=0,
)
ASKED = tuple(int(item) for item in ITEMS[:297:37])
EXACT = 1e-4
OUTCOMES = ("hit", "append", "miss")


class Version:
    """A ranker on one engine, for which appending is declared to be cheap, or not to be."""

    def __init__(self, root: Path, *, cache_mb: float = 16.0, alias: str = "serving", hop: int = 0) -> None:
        settings = SETTINGS.model_copy(update={"cache_mb": cache_mb, "history_hop": hop})
        self.ranker = Ranker.open(root, alias, settings=settings)
        warmed = self.ranker.warm("onnx")
        cost_s = {
            shape: {"encode": 1.0, "append": 1e-3}.get(shape.graph, 1e-4) for shape in warmed.buckets.cost_s
        }
        self.warmed = Warmed(warmed.engine, warmed.buckets.with_costs(cost_s))

    def rank(self, requests: Sequence[RankRequest], statistics: ItemStatistics) -> list[Any]:
        return [
            answer
            for start in range(0, len(requests), 32)
            for answer in self.ranker.rank(self.warmed, requests[start : start + 32], statistics)
        ]

    def scores(self, requests: Sequence[RankRequest], statistics: ItemStatistics) -> np.ndarray:
        """[requests, asked], in the order of the item ids asked for."""
        answers = self.rank(requests, statistics)
        assert all(isinstance(answer, RankedList) for answer in answers), answers
        by_item = np.argsort([answer.items for answer in answers], axis=1)
        return np.take_along_axis(np.array([answer.scores for answer in answers]), by_item, 1)


@pytest.fixture(scope="module")
def plain(registry: Registry) -> Version:
    """Without a cache."""
    return Version(registry.root, cache_mb=0)


@pytest.fixture
def cached(registry: Registry) -> Version:
    return Version(registry.root)


@pytest.fixture
def outcomes() -> Iterator[Any]:
    """How many histories were known, appended to and encoded since the last call."""

    def read() -> list[int]:
        return [int(metrics.cache_users(outcome)._value.get()) for outcome in OUTCOMES]

    before = read()

    def since() -> dict[str, int]:
        nonlocal before
        now = read()
        counted = {outcome: new - old for outcome, new, old in zip(OUTCOMES, now, before, strict=True)}
        before = now
        return counted

    return since


def events(rng: np.random.Generator, shape: int | tuple[int, int]) -> np.ndarray:
    """Random events: most items known, some not; gaps from none to weeks, and a clock that ran back."""
    made = np.zeros(shape, NARROW_EVENT)
    made["item"] = np.where(rng.random(shape) < 0.9, rng.choice(ITEMS, shape), rng.integers(1, 2**32, shape))
    made["category_behavior"] = rng.integers(48, 62, shape) | rng.integers(0, 4, shape) << 30
    gaps_s = np.exp(rng.uniform(0, 14, shape)).astype(np.int64) - 2
    made["timestamp"] = NOW_S + np.cumsum(gaps_s, axis=-1)
    return made


def packed(made: np.ndarray) -> bytes | None:
    fence = pack_fence(1, 0, float(made["timestamp"].sum()))
    return bytes((NARROW, 1)) + fence + made.tobytes() if len(made) else None


def ask(user: int, made: np.ndarray, **fields: Any) -> RankRequest:
    return RankRequest(user, packed(made), **{"k": len(ASKED), "candidates": ASKED, **fields})


def test_ten_thousand_growing_histories_score_as_if_each_were_encoded_whole(
    cached: Version, plain: Version, statistics: ItemStatistics, outcomes: Any
) -> None:
    rng = np.random.default_rng(3)
    histories, group, steps = 10_000, 500, 4
    worst, counted = 0.0, dict.fromkeys(OUTCOMES, 0)
    for first in range(0, histories, group):
        made = events(rng, (group, 100))
        starts, ends = np.zeros(group, np.int64), rng.integers(0, 80, group)
        for _ in range(steps):
            ends = np.minimum(ends + rng.choice(4, group, p=[0.3, 0.5, 0.15, 0.05]), 100)
            aged = rng.random(group) < 0.03
            starts[aged] = np.minimum(starts[aged] + 2, ends[aged])
            users = np.flatnonzero(rng.random(group) < 0.6)
            # Others each time: what is compared is computed from the states, not remembered.
            asked = tuple(rng.choice(ITEMS, len(ASKED), replace=False).tolist())
            requests = [
                ask(first + user, made[user, starts[user] : ends[user]], candidates=asked)
                for user in users.tolist()
            ]
            outcomes()
            ours = cached.scores(requests, statistics)
            counted = {outcome: counted[outcome] + more for outcome, more in outcomes().items()}
            worst = max(worst, float(np.abs(ours - plain.scores(requests, statistics)).max()))
    assert worst <= EXACT
    assert min(counted.values()) > histories / 4, counted


def test_an_ask_again_costs_no_encoding_and_a_click_costs_one_event(
    cached: Version, statistics: ItemStatistics, outcomes: Any
) -> None:
    made = events(np.random.default_rng(1), 40)
    seen = Spy(cached)
    for end, asked, graphs, outcome in (
        (30, ASKED, ["encode", "score"], "miss"),
        (30, ASKED, [], "hit"),
        (30, ASKED[::-2], [], "hit"),
        (30, (*ASKED[:5], 7), ["score"], "hit"),
        (31, ASKED, ["append", "score"], "append"),
        (34, ASKED, ["append", "append", "append", "score"], "append"),
        (40, ASKED, ["encode", "score"], "miss"),
    ):
        seen.graphs.clear()
        cached.rank([ask(1, made[:end], candidates=asked)], statistics)
        assert seen.graphs == graphs
        assert outcomes() == {**dict.fromkeys(OUTCOMES, 0), outcome: 1}


def test_scores_known_from_the_last_list_are_those_of_the_items_asked_for(
    cached: Version, plain: Version, statistics: ItemStatistics
) -> None:
    rng = np.random.default_rng(11)
    made = events(rng, (6, 30))
    for _ in range(8):
        requests = [
            ask(
                user,
                made[user],
                k=400,
                candidates=tuple(rng.choice(ITEMS[:30], size, replace=False).tolist()),
            )
            for user, size in enumerate((0, 3, 20, 30, 30, 29))
        ]
        requests += [ask(6, made[0], k=400, candidates=tuple(ITEMS.tolist())), ask(7, made[0][:0])]
        for ours, theirs in zip(
            cached.rank(requests, statistics), plain.rank(requests, statistics), strict=True
        ):
            scores = dict(zip(theirs.items, theirs.scores, strict=True))
            assert {item: pytest.approx(score, abs=EXACT) for item, score in scores.items()} == dict(
                zip(ours.items, ours.scores, strict=True)
            )


def test_whatever_is_not_the_same_history_or_a_longer_one_is_encoded(
    cached: Version, plain: Version, statistics: ItemStatistics, outcomes: Any
) -> None:
    made = events(np.random.default_rng(2), MAX_HISTORY + 9)
    corrected = made[:50].copy()
    corrected["item"][20] += 7
    slid, full = made[: MAX_HISTORY + 1], made[:MAX_HISTORY]
    for before, after in (
        (made[:50], made[1:50]),
        (made[:50], made[1:51]),
        (made[:50], corrected),
        (made[:50], made[:55]),
        (full, slid),
    ):
        cached.rank([ask(1, events(np.random.default_rng(9), 5))], statistics)
        cached.rank([ask(1, before)], statistics)
        outcomes()
        scores = cached.scores([ask(1, after)], statistics)
        assert outcomes()["miss"] == 1
        assert np.abs(scores - plain.scores([ask(1, after)], statistics)).max() <= EXACT
    cached.rank([ask(2, made[: MAX_HISTORY - 1])], statistics)
    cached.rank([ask(2, full)], statistics)
    assert outcomes() == {"hit": 0, "append": 1, "miss": 1}
    cached.rank([ask(3, full)], statistics)
    assert outcomes() == {"hit": 0, "append": 0, "miss": 1}


def test_a_window_that_slides_is_appended_to_where_it_starts_at_an_anchor(
    registry: Registry, statistics: ItemStatistics, outcomes: Any
) -> None:
    """The same is shown, whether anything is kept or not."""
    hop, users, clicks = MAX_HISTORY // 2, 12, 60
    cached, plain = (Version(registry.root, cache_mb=cache_mb, hop=hop) for cache_mb in (16.0, 0.0))
    made = events(np.random.default_rng(13), (users, MAX_HISTORY + clicks))
    for number in range(clicks):
        requests = [
            ask(user, made[user, number : MAX_HISTORY + number], candidates=ASKED[:: 1 - 2 * (number % 2)])
            for user in range(users)
        ]
        scores = cached.scores(requests, statistics)
        assert np.abs(scores - plain.scores(requests, statistics)).max() <= EXACT
    counted = outcomes()
    assert counted["append"] > 0.85 * users * (clicks - 1), counted


def test_what_was_bought_before_the_anchor_is_not_recommended(
    registry: Registry, statistics: ItemStatistics
) -> None:
    version = Version(registry.root, hop=MAX_HISTORY // 2)
    rng = np.random.default_rng(17)
    for _ in range(40):
        made = events(rng, MAX_HISTORY)
        made["item"] = rng.choice(ITEMS, MAX_HISTORY)
        made["category_behavior"] &= 2**30 - 1
        if anchors(unpack([packed(made)]), MAX_HISTORY, MAX_HISTORY // 2)[0]:
            break
    (before,) = version.rank([ask(1, made, candidates=None, k=200)], statistics)
    best = next(place for place, item in enumerate(made["item"]) if item in before.items)
    made["item"][0] = made["item"][best]
    made["category_behavior"][0] |= BEHAVIORS.index("buy") << 30
    (after,) = version.rank([ask(1, made, candidates=None, k=200)], statistics)
    assert made["item"][0] in before.items
    assert made["item"][0] not in after.items


def test_the_clicks_of_one_user_in_one_batch_each_have_their_own_scores(
    cached: Version, plain: Version, statistics: ItemStatistics, outcomes: Any
) -> None:
    made = events(np.random.default_rng(4), 30)
    cached.rank([ask(1, made[:20])], statistics)
    outcomes()
    for ends in ((21, 22, 23), (22, 24, 20), (24, 25)):
        requests = [ask(1, made[:end]) for end in ends]
        assert np.abs(cached.scores(requests, statistics) - plain.scores(requests, statistics)).max() <= EXACT
    assert outcomes() == {"hit": 1, "append": 7, "miss": 0}


def test_lists_with_a_cache_are_the_lists_without(
    cached: Version, plain: Version, statistics: ItemStatistics
) -> None:
    rng = np.random.default_rng(5)
    made = events(rng, (40, 60))
    ends = rng.integers(0, 55, 40)
    for grown in (0, 0, 1, 0, 2):
        ends += grown
        requests = [
            RankRequest(user, packed(made[user, : ends[user]]), candidates=None if user % 5 else ASKED)
            for user in range(40)
        ]
        for ours, theirs in zip(
            cached.rank(requests, statistics), plain.rank(requests, statistics), strict=True
        ):
            assert ours.scores == pytest.approx(theirs.scores, abs=EXACT)
            assert set(ours.items[:5]) & set(theirs.items[:6])
            assert ours.sources == theirs.sources


def test_retrieval_is_not_repeated_while_the_history_is_the_same(
    cached: Version, statistics: ItemStatistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[int] = []
    search = cached.ranker._index.search
    monkeypatch.setattr(
        cached.ranker._index, "search", lambda vectors, k: searched.append(len(vectors)) or search(vectors, k)
    )
    made = events(np.random.default_rng(6), 20)
    cached.rank([ask(1, made[:10])], statistics)  # brings candidates: nothing is retrieved
    for _ in range(3):
        cached.rank([ask(1, made[:10], candidates=None)], statistics)
    cached.rank([ask(1, made[:11], candidates=None), ask(2, made[:4], candidates=None)], statistics)
    cached.rank([ask(1, made[:11], candidates=None), ask(2, made[:4], candidates=None)], statistics)
    assert searched == [1, 2]


def test_versions_do_not_see_what_another_has_kept(
    registry: Registry, cached: Version, statistics: ItemStatistics, tmp_path: Path
) -> None:
    from tests.inference.conftest import publish

    publish(tmp_path, "other", seed=6)
    other, other_plain = Version(tmp_path), Version(tmp_path, cache_mb=0)
    requests = [ask(1, events(np.random.default_rng(7), 30))]
    ours = cached.scores(requests, statistics)
    theirs = other.scores(requests, statistics)
    assert np.abs(ours - theirs).max() > 1e-2
    for _ in range(2):
        assert (
            np.abs(other.scores(requests, statistics) - other_plain.scores(requests, statistics)).max()
            <= EXACT
        )
        assert np.abs(cached.scores(requests, statistics) - ours).max() <= EXACT


def test_a_version_without_the_append_graph_serves_on(
    registry: Registry, statistics: ItemStatistics, tmp_path: Path, outcomes: Any
) -> None:
    artefact = registry.open()
    staging = tmp_path / "staging"
    staging.mkdir()
    for name in artefact.manifest.files:
        if name != "append.onnx":
            (staging / name).write_bytes(artefact.read(name))
    graphs = {name: file for name, file in artefact.manifest.graphs.items() if name != "append"}
    older = Registry(tmp_path / "models")
    older.publish(staging, artefact.manifest.model_copy(update={"graphs": graphs, "files": {}}))
    older.promote(artefact.version)
    version = Version(older.root)
    made = events(np.random.default_rng(8), 20)
    for end in (10, 10, 11):
        version.rank([ask(1, made[:end])], statistics)
    assert outcomes() == {"hit": 1, "append": 0, "miss": 2}


def test_an_engine_that_keeps_no_states_is_asked_for_everything(
    registry: Registry, cached: Version, statistics: ItemStatistics, outcomes: Any
) -> None:
    cached.warmed.engine.load(registry.open(), ("encode", "rank"))
    seen = Spy(cached)
    seen.keeps_states = False
    for _ in range(2):
        cached.rank([ask(1, events(np.random.default_rng(8), 20))], statistics)
    assert seen.graphs == ["encode", "rank"] * 2
    assert sum(outcomes().values()) == 0


def test_numbers_that_are_not_finite_are_not_kept(
    cached: Version, plain: Version, statistics: ItemStatistics
) -> None:
    seen = Spy(cached)
    seen.spoilt = True
    requests = [ask(user, events(np.random.default_rng(user), 20)) for user in range(3)]
    assert all(isinstance(answer, EngineFailed) for answer in cached.rank(requests, statistics))
    seen.spoilt = False
    assert np.abs(cached.scores(requests, statistics) - plain.scores(requests, statistics)).max() <= EXACT


def test_appending_where_it_is_slower_than_encoding_is_not_done(
    cached: Version, statistics: ItemStatistics, outcomes: Any
) -> None:
    buckets = cached.warmed.buckets
    slow = {**buckets.cost_s, Shape("append", 1, 10, 0): 2.0}
    cached.warmed = Warmed(cached.warmed.engine, buckets.with_costs(slow))
    made = events(np.random.default_rng(9), 30)
    for end in (8, 9, 20, 21):
        cached.rank([ask(1, made[:end])], statistics)
    assert outcomes() == {"hit": 0, "append": 1, "miss": 3}


def test_a_known_history_that_is_scored_anew_is_not_copied(
    cached: Version, plain: Version, statistics: ItemStatistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = events(np.random.default_rng(12), cached.ranker.model.max_history)
    others = tuple(int(item) for item in ITEMS[1:298:37])
    cached.rank([ask(1, made, candidates=ASKED)], statistics)
    cache = cached.ranker._encoder._cache
    assert cache is not None
    lent: list[bool] = []
    run = cached.warmed.engine.run

    def spy(graph: Graph, inputs: Tensors) -> Tensors:
        if graph == "score":
            lent.append(np.shares_memory(inputs["key_0"], cache._states))
        return run(graph, inputs)

    monkeypatch.setattr(cached.warmed.engine, "run", spy)
    for asked in (others, others, ASKED):
        ours, theirs = (one.scores([ask(1, made, candidates=asked)], statistics) for one in (cached, plain))
        assert np.abs(ours - theirs).max() <= EXACT
    # The second of the three was known.
    assert lent == [True, True]
    assert not any(cache._slots.pins)


# The cache alone -----------------------------------------------------------------------------------

SHAPE = ModelShape(dim=4, layers=2, heads=1, ffn=4, max_history=8, item_rows=9, category_rows=9)
SIGNS = dict(zip(SHAPE.state_names, (1, -1, 2, -2), strict=True))


def history(*items: int) -> bytes:
    body = b"".join(pack_event(item, 1, 0, NOW_S) for item in items)
    return newest_events(bytes((NARROW, 0)) + body, len(items))


def lengths(histories: Sequence[bytes]) -> list[int]:
    return [len(one) // NARROW_EVENT.itemsize for one in histories]


def find(cache: UserCache, users: Sequence[int], histories: Sequence[bytes], precision: str = "f32") -> Found:
    return cache.find(users, histories, lengths(histories), precision)


def keep(cache: UserCache, users: Sequence[int], histories: Sequence[bytes], value: float = 1.0) -> None:
    """States that say which history they are of: the item of each event, plus a value."""
    state = np.zeros((len(users), 8, 4), np.float32)
    for row, one in enumerate(histories):
        items = np.frombuffer(one[1:], NARROW_EVENT)["item"]
        state[row, : len(items)] = items[:, None] + value
    derived = Derived.nothing(len(users), SHAPE.dim, 3, 5)
    derived.vectors[:] = np.array([[len(one)] * 4 for one in histories])
    rows = range(len(users))
    states = {name: sign * state for name, sign in SIGNS.items()}
    cache.keep(users, histories, lengths(histories), [Computed(rows, rows, states)], derived, rows, "f32")


def kept(cache: UserCache, users: Sequence[int], histories: Sequence[bytes]) -> list[int]:
    """How many events are known of each history; their states are looked at."""
    with find(cache, users, histories) as found:
        states = cache.states([max(slot, 0) for slot in found.slots], len(users), 8)
        vectors = cache.derived.vectors[found.slots]
    for row, (one, known) in enumerate(zip(histories, found.known, strict=True)):
        items = np.frombuffer(one[1:], NARROW_EVENT)["item"][:known].astype(np.float32)
        for name, sign in SIGNS.items():
            assert (states[name][row, :known] == sign * (items[:, None] + 1)).all()
        assert not found.same[row] or (vectors[row] == len(one)).all()
    return found.known


def test_memory_is_bounded_and_the_user_asked_for_longest_ago_leaves_first() -> None:
    budget_mb = 4.5 * UserCache.user_bytes(SHAPE, retrieved=3, listed=5) / 2**20
    cache = UserCache.within(budget_mb, SHAPE, retrieved=3, listed=5)
    assert cache is not None and cache.slots == 4
    for user in range(4):
        keep(cache, [user], [history(user, 1)])
    assert kept(cache, [0], [history(0, 1)]) == [2]
    keep(cache, [4, 5], [history(4, 1), history(5, 1)])
    assert kept(cache, range(6), [history(user, 1) for user in range(6)]) == [2, 0, 0, 2, 2, 2]
    keep(cache, range(10, 30), [history(user) for user in range(10, 30)])
    assert len(cache) == 4
    assert UserCache.within(0, SHAPE, retrieved=3, listed=5) is None


def test_a_shorter_history_that_comes_late_does_not_replace_the_longer_one() -> None:
    cache = UserCache(SHAPE, 4, retrieved=3, listed=5)
    keep(cache, [1, 1, 1], [history(1, 2), history(1, 2, 3), history(1)])
    assert kept(cache, [1] * 4, [history(1, 2, 3, 4), history(1, 2, 3), history(1, 2), history(1)]) == [
        3,
        3,
        1,
        0,
    ]
    keep(cache, [1], [history(1, 2)])
    assert kept(cache, [1], [history(1, 2, 3)]) == [3]
    keep(cache, [1], [history(2, 3)])
    assert kept(cache, [1, 1], [history(1, 2, 3), history(2, 3)]) == [0, 2]
    assert len(cache) == 1


def test_what_is_being_read_is_not_overwritten() -> None:
    cache = UserCache(SHAPE, 2, retrieved=3, listed=5)
    keep(cache, [1, 2], [history(1), history(2)])
    with find(cache, [1, 2], [history(1), history(2)]) as found:
        keep(cache, [3, 1], [history(3), history(1, 5)])
        states = cache.states(found.slots, 2, 8)
        assert (states["key_0"][:, 0, 0] == [2, 3]).all()
    keep(cache, [1], [history(1, 5)])
    assert kept(cache, [1, 2, 3], [history(1, 5), history(2), history(3)]) == [2, 1, 0]


def test_one_user_s_states_are_lent_where_they_fill_the_batch_and_copied_elsewhere() -> None:
    cache = UserCache(SHAPE, 2, retrieved=3, listed=5)
    keep(cache, [1, 2], [history(1), history(2)])
    with find(cache, [1, 2], [history(1), history(2)]) as found:
        for events in (8, 4):
            lent = cache.states(found.slots[:1], 1, events, lend=True)
            for name, copied in cache.states(found.slots[:1], 1, events).items():
                assert np.shares_memory(lent[name], cache._states)
                assert not np.shares_memory(copied, cache._states)
                assert lent[name].flags.c_contiguous and np.array_equal(lent[name], copied)
        for slots, batch, events in ((found.slots, 2, 8), (found.slots[:1], 2, 8), (found.slots, 2, 4)):
            copied = cache.states(slots, batch, events, lend=True)["key_0"]
            assert not np.shares_memory(copied, cache._states)


def test_without_states_only_what_follows_from_a_known_history_is_kept() -> None:
    cache = UserCache(SHAPE, 3, retrieved=3, listed=5)
    keep(cache, [1], [history(1, 2)])
    derived = Derived.nothing(3, SHAPE.dim, 3, 5)
    derived.vectors[:] = len(history(1, 2))
    derived.has_retrieved[:] = True
    # Of the second user another history is known than was lent, of the third nothing any more.
    keep(cache, [2], [history(5)])
    asked = [history(1, 2), history(5, 6), history(7)]
    cache.keep([1, 2, 3], asked, lengths(asked), [], derived, [0, 1, 2], "f32")
    assert kept(cache, [1, 2, 3], asked) == [2, 1, 0]
    with find(cache, [1, 2], [history(1, 2), history(5)]) as found:
        assert cache.derived.has_retrieved[found.slots].tolist() == [True, False]


def test_states_of_another_precision_are_not_found() -> None:
    cache = UserCache(SHAPE, 2, retrieved=3, listed=5)
    keep(cache, [1], [history(1)])
    with find(cache, [1], [history(1)], "bf16") as found:
        assert found.slots == [-1]


def test_threads_never_see_a_slot_half_written() -> None:
    cache = UserCache(SHAPE, 5, retrieved=3, listed=5)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(1_000):
            users = rng.choice(9, 4).tolist()
            shops = rng.integers(0, 2, 4) * 100
            histories = [
                history(*(shop + 10 * user + np.arange(rng.integers(1, 8))).tolist())
                for user, shop in zip(users, shops, strict=True)
            ]
            kept(cache, users, histories)
            keep(cache, users, histories)

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, seed) for seed in range(4)]:
            done.result()
    assert 0 < len(cache) <= 5
    # Every slot is still to be had.
    keep(cache, range(50, 60), [history(user) for user in range(50, 60)])
    assert len(cache) == 5


def test_a_history_is_told_from_another_by_its_events_and_their_format() -> None:
    wide = pack_event(2**40, 1, 0, NOW_S)
    narrow = np.frombuffer(wide, NARROW_EVENT).tobytes()
    as_wide = newest_events(bytes((WIDE, 0)) + wide, 1)
    as_narrow = newest_events(bytes((NARROW, 1)) + pack_fence(1, 2, 3.0) + narrow, 2)
    assert not as_narrow.startswith(as_wide)
    assert newest_events(bytes((NARROW, 0)) + narrow, 2) == as_narrow
    assert newest_events(bytes((NARROW, 0)) + narrow, 1) == bytes((NARROW,)) + narrow[-12:]
    assert newest_events(bytes((NARROW, 1)) + pack_fence(1, 2, 3.0), 0) == b""


class Spy:
    """Notes which graphs a version's engine runs; user vectors may be spoilt on the way out."""

    def __init__(self, version: Version) -> None:
        self._engine = version.warmed.engine
        self.graphs: list[str] = []
        self.spoilt = False
        self.keeps_states = True
        version.warmed = Warmed(self, version.warmed.buckets)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self, graph: Graph, inputs: Tensors) -> Tensors:
        self.graphs.append(graph)
        outputs = self._engine.run(graph, inputs)
        if self.spoilt and graph == "encode":
            outputs["user_vector"][:] = np.nan
        return outputs

    def run_for(self, graph: Graph, inputs: Tensors, outputs: Sequence[str]) -> Tensors:
        answers = self.run(graph, inputs)
        return {name: answers[name] for name in outputs}
