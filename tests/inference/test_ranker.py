"""Packed sequences in, ranked lists out, on a tiny released version."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compression.releases.registry import Registry
from features.settings import FeatureSettings
from features.statistics import ItemStatistics
from inference import engines
from inference.engines.base import EngineOptions
from inference.errors import EngineFailed, ModelUnavailable
from inference.ranker import Ranker, Warmed
from inference.settings import InferenceSettings
from inference.types import Graph, RankedList, RankRequest, Tensors
from tests.inference.conftest import ITEMS, MAX_HISTORY, sequence

SETTINGS = InferenceSettings(
    runners=1,
    engine="onnx",
    histories=(4, 10, 100),
    candidate_sizes=(8, 50),
    batches=(1, 2, 4, 8),
    retrieved=40,
)
LENGTHS = (1, 2, 3, 4, 5, 9, 10, 11, 25, 69, 70, 85)


class Spy:
    """Notes the shape of every run; answers may be spoilt on the way out."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._run = engine.run
        self.shapes: list[tuple[str, int, int, int]] = []
        self.nans = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run_for(self, graph: Graph, inputs: Tensors, outputs: Any) -> Tensors:
        return {name: array for name, array in self.run(graph, inputs).items() if name in outputs}

    def run(self, graph: Graph, inputs: Tensors) -> Tensors:
        history = inputs["items"].shape[1] if graph != "score" else inputs["key_0"].shape[1]
        candidates = inputs["candidates"].shape[1] if graph in ("score", "rank") else 0
        self.shapes.append((graph, len(inputs["lengths"]), history, candidates))
        outputs: Tensors = self._run(graph, inputs)
        if graph == "score" and self.nans:  # however many calls its users are cut into
            self.nans -= 1
            outputs["scores"][0, 0] = np.nan
        return outputs


class Opened:
    """A version with one warmed engine."""

    def __init__(self, registry_root: Path, settings: InferenceSettings = SETTINGS, **told: Any) -> None:
        self.ranker = Ranker.open(registry_root, settings=settings, **told)
        self.warmed = self.ranker.warm(settings.engine)

    def rank(self, requests: list[RankRequest], statistics: ItemStatistics) -> list[Any]:
        return self.ranker.rank(self.warmed, requests, statistics)

    def close(self) -> None:
        self.warmed.close()


@pytest.fixture(scope="module")
def opened(registry: Registry) -> Iterator[Opened]:
    version = Opened(registry.root)
    yield version
    version.close()


@pytest.fixture
def spy(opened: Opened) -> Iterator[Spy]:
    """On the only engine there is."""
    warmed = opened.warmed
    seen = Spy(warmed.engine)
    opened.warmed = Warmed(seen, warmed.buckets)  # type: ignore[arg-type]
    yield seen
    opened.warmed = warmed


def user(number: int, length: int, **fields: Any) -> RankRequest:
    rng = np.random.default_rng(number)
    return RankRequest(number, sequence(rng.choice(ITEMS, length).tolist()), **fields)


def lists(answers: list[Any]) -> list[RankedList]:
    assert all(isinstance(answer, RankedList) for answer in answers), answers
    return answers


def test_given_candidates_score_the_same_in_one_graph_as_in_two(
    opened: Opened, registry: Registry, statistics: ItemStatistics
) -> None:
    """Where nothing keeps states, they go through "rank"."""
    requests = [
        user(number, length, k=50, candidates=tuple(ITEMS[number : number + 3 * number + 1].tolist()))
        for number, length in enumerate((*LENGTHS, 0, 100))
    ]
    requests[3] = dataclasses.replace(requests[3], exclude=(int(ITEMS[4]),))
    alone = Opened(registry.root, SETTINGS.model_copy(update={"cache_mb": 0.0}))
    try:
        spied = Spy(alone.warmed.engine)
        alone.warmed = Warmed(spied, alone.warmed.buckets)  # type: ignore[arg-type]
        at_once = lists(alone.rank(requests, statistics))
        assert {graph for graph, *_ in spied.shapes} == {"rank"}
    finally:
        alone.close()
    for one, other in zip(at_once, lists(opened.rank(requests, statistics)), strict=True):
        assert one.items == other.items
        assert one.sources == other.sources
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)


def test_a_list_is_best_first_without_repeats_and_says_who_made_it(
    opened: Opened, statistics: ItemStatistics
) -> None:
    (answer,) = lists(opened.rank([user(1, 7, k=10)], statistics))
    assert len(answer.items) == len(set(answer.items)) == 10
    assert answer.scores == sorted(answer.scores, reverse=True)
    assert set(answer.sources) <= {"retrieval", "transition", "recent", "category", "popular"}
    assert (answer.model_version, answer.engine) == ("20260101T000000-test", "onnx")
    assert {"unpack", "encode", "retrieve", "candidates", "score", "select", "rank"} <= set(answer.timings_ms)


def test_scores_do_not_depend_on_the_rest_of_the_batch(opened: Opened, statistics: ItemStatistics) -> None:
    asked = tuple(int(item) for item in ITEMS[::11])
    requests = [user(number, length, k=50, candidates=asked) for number, length in enumerate(LENGTHS)]
    together = lists(opened.rank(requests, statistics))
    for request, answer in zip(requests, together, strict=True):
        (alone,) = lists(opened.rank([request], statistics))
        expected = dict(zip(alone.items, alone.scores, strict=True))
        assert set(expected) == set(answer.items) == set(asked)
        for item, score in zip(answer.items, answer.scores, strict=True):
            assert score == pytest.approx(expected[item], abs=1e-5)


def test_engines_agree_on_scores(opened: Opened, registry: Registry, statistics: ItemStatistics) -> None:
    small = SETTINGS.model_copy(update={"engine": "numpy", "batches": (4,), "candidate_sizes": (50,)})
    plain = Opened(registry.root, small)
    requests = [
        user(1, 3, candidates=tuple(ITEMS[:40].tolist())),
        user(2, 12, candidates=tuple(ITEMS[:40].tolist())),
    ]
    for ours, theirs in zip(
        lists(opened.rank(requests, statistics)), lists(plain.rank(requests, statistics)), strict=True
    ):
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-4)
    plain.close()


def test_only_warmed_shapes_reach_the_engine_and_short_histories_are_not_padded_to_long_ones(
    opened: Opened, spy: Spy, statistics: ItemStatistics
) -> None:
    warmed = set(opened.ranker.buckets.shapes())
    requests = [user(1_000 + number, length) for number, length in enumerate([1] * 13 + [85] * 9)]
    assert len(lists(opened.rank(requests, statistics))) == 22
    opened.rank([user(2_000, 2, candidates=tuple(ITEMS[:130].tolist()))], statistics)
    assert set(spy.shapes) <= {tuple(shape) for shape in warmed}
    # Which short one it is goes by what they were measured to cost.
    histories = {history for _, _, history, _ in spy.shapes}
    assert MAX_HISTORY in histories and histories - {MAX_HISTORY} and histories <= {4, 10, MAX_HISTORY}


def test_more_candidates_than_any_bucket_are_scored_in_parts_like_the_rest(
    opened: Opened, spy: Spy, statistics: ItemStatistics
) -> None:
    many = tuple(int(item) for item in ITEMS)
    few = many[:5]
    requests = [
        user(1, 6, k=1_000, candidates=many),
        user(2, 6, k=1_000, candidates=few),
        user(1, 6, candidates=few),
    ]
    long, short, same = lists(opened.rank(requests, statistics))
    assert (len(long.items), len(short.items)) == (300, 5)
    by_item = dict(zip(long.items, long.scores, strict=True))
    for item, score in zip(same.items, same.scores, strict=True):
        assert by_item[item] == pytest.approx(score, abs=1e-5)


def test_explicit_candidates_may_be_unknown_repeated_or_none_at_all(
    opened: Opened, statistics: ItemStatistics
) -> None:
    unknown = 2**63 - 1
    requests = [
        user(1, 5, candidates=(unknown, 3, int(ITEMS[0]), int(ITEMS[0]))),
        user(2, 5, candidates=()),
        user(3, 0, candidates=(int(ITEMS[5]), unknown)),
    ]
    first, none, newcomer = lists(opened.rank(requests, statistics))
    assert sorted(first.items) == sorted({unknown, 3, int(ITEMS[0])})
    assert set(first.sources) == {"request"}
    assert (none.items, none.scores, none.sources) == ([], [], [])
    assert len(newcomer.items) == 2
    assert np.isfinite(first.scores + newcomer.scores).all()


def test_a_user_without_history_gets_what_is_popular(opened: Opened, statistics: ItemStatistics) -> None:
    (answer,) = lists(opened.rank([RankRequest(1, None, k=1_000)], statistics))
    assert sorted(answer.items) == sorted(ITEMS[:20].tolist())
    assert set(answer.sources) == {"popular"}


def test_when_everything_is_excluded_the_list_is_empty_and_the_neighbour_has_one(
    opened: Opened, statistics: ItemStatistics
) -> None:
    everything = tuple(ITEMS.tolist())
    nothing, some = lists(opened.rank([user(1, 4, exclude=everything), user(2, 4)], statistics))
    assert nothing.items == []
    assert len(some.items) == 10


def test_no_requests_are_no_answers(opened: Opened, statistics: ItemStatistics) -> None:
    assert opened.rank([], statistics) == []


def test_a_number_that_is_not_finite_fails_its_own_list_only(
    opened: Opened, spy: Spy, statistics: ItemStatistics
) -> None:
    spy.nans = 1
    requests = [user(number, 3) for number in range(4)]
    answers = opened.rank(requests, statistics)
    assert [type(answer) for answer in answers].count(EngineFailed) == 1
    assert [type(answer) for answer in answers].count(RankedList) == 3


def test_a_bought_item_is_gone_and_a_click_changes_the_list(
    opened: Opened, statistics: ItemStatistics
) -> None:
    viewed = ITEMS[[40, 41, 42]].tolist()
    before, after = lists(
        opened.rank(
            [
                RankRequest(1, sequence(viewed, behavior=3), k=50),
                RankRequest(1, sequence([*viewed, int(ITEMS[90])]), k=50),
            ],
            statistics,
        )
    )
    assert not set(viewed) & set(before.items)
    assert int(ITEMS[90]) in after.items
    assert before.items != after.items


def test_a_cap_on_categories_holds(registry: Registry, statistics: ItemStatistics) -> None:
    features = FeatureSettings(category_cap=2, seen_filter="none")
    ranker = Opened(registry.root, features=features)
    (answer,) = lists(ranker.rank([user(1, 9, k=50)], statistics))
    categories = [int(np.searchsorted(ITEMS, item)) % 10 for item in answer.items]
    assert max(categories.count(category) for category in set(categories)) <= 2
    ranker.close()


def test_an_altered_version_is_refused_with_the_reason(registry: Registry, tmp_path: Path) -> None:
    import shutil

    copied = shutil.copytree(registry.root, tmp_path / "registry")
    (graph,) = copied.glob("versions/*/score.onnx")
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(ModelUnavailable, match=r"score\.onnx"):
        Ranker.open(copied, settings=SETTINGS)
    with pytest.raises(ModelUnavailable, match="nowhere"):
        Ranker.open(copied, "nowhere", settings=SETTINGS)


def test_a_version_that_answers_with_nan_never_becomes_ready(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str, options: EngineOptions) -> Any:
        spy = Spy(create(name, options))
        spy.nans = 1
        return spy

    create = engines.create
    monkeypatch.setattr(engines, "create", broken)
    with pytest.raises(ModelUnavailable, match="not finite"):
        Opened(registry.root)


def test_settings_are_frozen_and_complain_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERENCE_HISTORIES", "[5, 3]")
    with pytest.raises(ValueError, match="ascend"):
        InferenceSettings()
    monkeypatch.setenv("INFERENCE_HISTORIES", "[3, 5]")
    monkeypatch.setenv("INFERENCE_THREADS", "2")
    settings = InferenceSettings()
    assert (settings.histories, settings.engine_options().threads) == ((3, 5), 2)
    with pytest.raises(ValueError, match="frozen"):
        settings.threads = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.engine_options().threads = 3
