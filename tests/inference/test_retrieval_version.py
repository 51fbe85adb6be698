"""A retrieval version serves as a ranking one does: every engine, the cache, the server, swaps."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from compression.releases.registry import Artefact, Registry
from compression.retrieval.ensemble import mean_of
from compression.retrieval.retriever import Retriever
from features.encoding import encode_histories
from features.fusion import Fusion
from features.sequence import unpack
from features.settings import FeatureSettings
from features.statistics import ItemStatistics
from inference import engines
from inference.engines.base import GRAPHS, TOLERANCE, EngineOptions, Precision, Shape, inputs_of, outputs_of
from inference.errors import ModelUnavailable
from inference.oip.graph_models import GraphSet
from inference.oip.models import Question
from inference.plane import Plane
from inference.ranker import Ranker, Warmed
from inference.releases.metrics import ReleaseMetrics
from inference.releases.serving import ServingModel
from inference.releases.settings import ReleaseRules
from inference.types import Graph, RankedList, RankRequest, Tensors
from inference.user_cache import UserCache
from tests.inference import retrieval_version
from tests.inference.conftest import ITEMS, MAX_HISTORY, sequence, vocabulary
from tests.inference.oip.conftest import INFERENCE, Running
from tests.inference.test_engine_parity import inputs
from tests.inference.test_ranker import SETTINGS, lists

KNOWN = tuple(ITEMS.tolist())
SHAPES = ((1, 1, 1), (4, 10, 8), (7, MAX_HISTORY, 50))
ENGINES: list[tuple[str, Precision]] = [
    ("onnx", "f32"),
    ("numpy", "f32"),
    ("openvino", "f32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
    ("torch", "bf16"),
]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Retriever]:
    root = tmp_path_factory.mktemp("retrieval") / "models"
    made = retrieval_version.publish(root)
    Registry(root).promote(retrieval_version.NAME)
    return root, made


@pytest.fixture(scope="module")
def both(released: tuple[Path, Retriever]) -> Artefact:
    return Registry(released[0]).open()


class Calls:
    """Notes which graph ran for how many users."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.made: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self, graph: Graph, given: Tensors) -> Tensors:
        self.made.append((graph, len(next(iter(given.values())))))
        answers: Tensors = self._engine.run(graph, given)
        return answers


@pytest.fixture
def serving(released: tuple[Path, Retriever]) -> Iterator[tuple[Ranker, Warmed, Calls]]:
    """Batches are cut as if every row took as long as the next, whatever was measured here."""
    ranker = Ranker.open(released[0], settings=SETTINGS)
    warmed = ranker.warm("onnx")
    calls = Calls(warmed.engine)
    alike = {shape: 1e-3 * shape.batch for shape in warmed.buckets.cost_s}
    yield ranker, Warmed(calls, warmed.buckets.with_costs(alike)), calls  # type: ignore[arg-type]
    warmed.close()


def expected(made: Retriever, request: RankRequest) -> np.ndarray:
    """By the mean of both networks' log-chances, [known items]."""
    histories = unpack([request.sequence], last=MAX_HISTORY)
    arrays = encode_histories(histories, vocabulary(), MAX_HISTORY)

    def alone(network: Any) -> Any:
        def scores(_: Any) -> Any:
            vectors = Retriever([network]).user_vectors(_history(arrays)).numpy()
            return vectors @ network.items.weight[1 : 1 + len(ITEMS)].numpy().T

        return scores

    with torch.inference_mode():
        return mean_of([alone(network) for network in made.members])(np.zeros(1, np.int64))[0]


def _history(arrays: Any) -> Any:
    from compression.evaluation.scoring import to_history

    return to_history(arrays)


def user(number: int, length: int, **fields: Any) -> RankRequest:
    rng = np.random.default_rng(number)
    return RankRequest(number, sequence(rng.choice(ITEMS, length).tolist()), **fields)


REQUESTS = [user(number, 5 + number) for number in range(8)]


@pytest.mark.parametrize("cache_mb", [0.0, 1.0])
def test_lists_are_ordered_by_the_mean_of_log_chances(
    released: tuple[Path, Retriever], statistics: ItemStatistics, cache_mb: float
) -> None:
    requests = [
        user(number, length, k=len(KNOWN), candidates=KNOWN) for number, length in enumerate((1, 7, 70))
    ]
    ranker = Ranker.open(released[0], settings=SETTINGS.model_copy(update={"cache_mb": cache_mb}))
    warmed = ranker.warm("onnx")
    for request, answer in zip(requests, lists(ranker.rank(warmed, requests, statistics)), strict=True):
        chances = expected(released[1], request)
        assert sorted(answer.items) == sorted(KNOWN)
        in_order = chances[np.searchsorted(ITEMS, answer.items)]
        assert (np.diff(in_order) <= 1e-5).all() and in_order[0] - in_order[-1] > 1.0
        # The same number lies between a score and its mean log-chance, whatever the item.
        assert np.ptp(answer.scores - in_order) < 1e-4
    warmed.close()


def test_what_it_finds_by_itself_is_what_its_networks_like_best(
    serving: tuple[Ranker, Warmed, Calls], released: tuple[Path, Retriever]
) -> None:
    from features.memory_store import MemoryStore

    ranker, warmed, _ = serving
    request = user(5, 1, k=10)
    (answer,) = lists(ranker.rank(warmed, [request], ItemStatistics(MemoryStore())))
    best = ITEMS[np.argsort(-expected(released[1], request), kind="stable")]
    assert answer.items == best[:10].tolist()
    assert set(answer.sources) <= {"retrieval", "recent"}


@pytest.mark.parametrize(("name", "precision"), ENGINES)
def test_engines_answer_as_torch(name: str, precision: Precision, both: Artefact) -> None:
    try:
        engine = engines.create(name, EngineOptions(precision=precision))
    except ModelUnavailable as refusal:
        if precision != "bf16":
            raise
        pytest.skip(str(refusal))
    torch_engine = engines.create("torch")
    for one in (engine, torch_engine):
        one.load(both, GRAPHS)
    for graph in GRAPHS:
        for seed, (batch, history, candidates) in enumerate(SHAPES):
            given = inputs(engine, Shape("rank", batch, history, candidates), seed)
            vectors = np.random.default_rng(seed).normal(size=(batch, both.manifest.model.dim))
            given["user_vector"] = vectors.astype(np.float32)
            given = {column: given[column] for column in inputs_of(graph, both.manifest.model)}
            ours, theirs = torch_engine.run(graph, dict(given)), engine.run(graph, dict(given))
            assert tuple(theirs) == outputs_of(graph, both.manifest.model)
            for output, reference in ours.items():
                scale = max(1.0, float(np.abs(reference).max()))
                assert theirs[output].dtype == np.float32
                assert np.abs(theirs[output] - reference).max() <= TOLERANCE[precision] * scale, (
                    graph,
                    output,
                )
    engine.close()


def test_a_known_history_encodes_nothing_and_a_click_encodes_it_once(
    serving: tuple[Ranker, Warmed, Calls], statistics: ItemStatistics
) -> None:
    ranker, warmed, calls = serving
    requests = [user(number, length) for number, length in enumerate((1, 7, 30, 70))]
    first = lists(ranker.rank(warmed, requests, statistics))
    assert sum(users for graph, users in calls.made if graph == "encode") >= 4
    # However long their histories, users are scored together.
    assert [made for made in calls.made if made[0] == "score"] == [("score", 4)]
    calls.made.clear()
    again = lists(ranker.rank(warmed, requests, statistics))
    assert calls.made == [("score", 4)] and ranker.users == 4
    assert [answer.items for answer in again] == [answer.items for answer in first]
    items = [*np.random.default_rng(1).choice(ITEMS, 7).tolist(), int(ITEMS[0])]
    grown = [RankRequest(1, sequence(items)), requests[3]]
    clicked = lists(ranker.rank(warmed, grown, statistics))
    assert [made for made in calls.made if made[0] != "score"] == [("encode", 1)]
    fresh = Ranker.open(ranker._artefact.path.parents[1], settings=SETTINGS)
    for one, other in zip(clicked, lists(fresh.rank(fresh.warm("onnx"), grown, statistics)), strict=True):
        assert one.items == other.items
        assert one.scores == pytest.approx(other.scores, abs=1e-5)


def test_a_user_takes_kilobytes_of_the_cache(both: Artefact) -> None:
    model = both.manifest.model
    few = UserCache.user_bytes(model, retrieved=100, listed=50)
    with_states = UserCache.user_bytes(model.model_copy(update={"states": True}), retrieved=100, listed=50)
    assert few < 5_000 and with_states - few == 2 * 2 * MAX_HISTORY * 24 * 4


def test_nobody_and_the_unknown_have_finite_lists(
    serving: tuple[Ranker, Warmed, Calls], statistics: ItemStatistics, released: tuple[Path, Retriever]
) -> None:
    ranker, warmed, _ = serving
    unknown = (1, 2, 3)
    asked = [
        RankRequest(1, None),
        RankRequest(2, None, k=3, candidates=KNOWN[:3]),
        RankRequest(3, sequence([*unknown, int(ITEMS[4])]), k=4, candidates=(*unknown, KNOWN[0])),
    ]
    nobody, zeros, new = lists(ranker.rank(warmed, asked, statistics))
    assert nobody.items == ITEMS[:10].tolist()
    assert zeros.scores == [0.0, 0.0, 0.0]
    mean = np.mean(released[1].item_table().numpy()[1 : 1 + len(ITEMS)], axis=0)
    scores = [score for item, score in zip(new.items, new.scores, strict=True) if item in unknown]
    assert len(scores) == 3 and np.ptp(scores) < 1e-6
    arrays = encode_histories(unpack([asked[2].sequence], last=MAX_HISTORY), vocabulary(), MAX_HISTORY)
    with torch.inference_mode():
        vector = released[1].user_vectors(_history(arrays)).numpy()[0]
    assert scores[0] == pytest.approx(float(vector @ mean), abs=1e-4)


def test_the_counts_weigh_as_the_manifest_says(tmp_path: Path, statistics: ItemStatistics) -> None:
    retrieval_version.publish(tmp_path, "counted", fusion=Fusion(popular=1_000.0))
    Registry(tmp_path).promote("counted")
    ranker = Ranker.open(tmp_path, settings=SETTINGS)
    warmed = ranker.warm("onnx")
    (answer,) = lists(ranker.rank(warmed, [user(4, 9)], statistics))
    assert answer.items[:5] == ITEMS[:5].tolist()
    warmed.close()


async def test_the_server_has_its_graphs(both: Artefact, released: tuple[Path, Retriever]) -> None:
    settings = SETTINGS.model_copy(update={"spread_ms": 0})
    graphs = await asyncio.to_thread(GraphSet.open, released[0], both.version, settings)
    try:
        encode, score, rank = graphs.models
        assert [spec.name for spec in score.inputs] == ["user_vector", "candidates"]
        assert [spec.name for spec in encode.outputs] == ["user_vector"]
        engine = engines.create("onnx")
        engine.load(both)
        given = inputs(engine, Shape("rank", 3, 9, 5), 1)
        history = {name: given[name] for name in inputs_of("encode", both.manifest.model)}
        vectors = (await encode.infer(Question(history, ("user_vector",)))).outputs
        asked = {**vectors, "candidates": given["candidates"]}
        apart = (await score.infer(Question(asked, ("scores",)))).outputs["scores"]
        together = (await rank.infer(Question(given, ("scores",)))).outputs["scores"]
        assert apart.shape == (3, 5)
        np.testing.assert_allclose(apart, together, atol=1e-4)
    finally:
        await graphs.close()


def test_another_server_scores_and_this_one_keeps_the_users(
    released: tuple[Path, Retriever], statistics: ItemStatistics
) -> None:
    """Vectors are light enough to bring back, so that nothing is encoded again to score."""
    with Running(Registry(released[0])) as running:
        ranker = Ranker.open(released[0], settings=INFERENCE)
        told = EngineOptions(url=running.grpc, timeout_ms=5_000)
        remote, local = ranker.warm("remote", told), ranker.warm("onnx")
        calls = Calls(remote.engine)
        answers = lists(ranker.rank(Warmed(calls, remote.buckets), REQUESTS, statistics))  # type: ignore[arg-type]
        assert {graph for graph, _ in calls.made} == {"encode", "score"} and ranker.users == len(REQUESTS)
        calls.made.clear()
        ranker.rank(Warmed(calls, remote.buckets), REQUESTS, statistics)  # type: ignore[arg-type]
        assert {graph for graph, _ in calls.made} == {"score"}
        fresh = Ranker.open(released[0], settings=INFERENCE)
        for one, other in zip(answers, lists(fresh.rank(local, REQUESTS, statistics)), strict=True):
            assert one.items == other.items
            assert one.scores == pytest.approx(other.scores, abs=1e-4)
        remote.close()
        local.close()


async def test_versions_of_both_kinds_replace_each_other_under_way(
    registry: Registry, tmp_path: Path, statistics: ItemStatistics
) -> None:
    root = tmp_path / "models"
    shutil.copytree(registry.root, root)
    retrieval_version.publish(root)
    ours, ranking = Registry(root), registry.resolve("serving")
    settings = SETTINGS.model_copy(update={"runners": 2, "histories": (10, 100), "batches": (1, 4)})
    model = ServingModel(
        Plane(settings, FeatureSettings(), statistics),
        ReleaseRules(root),
        ReleaseMetrics(CollectorRegistry()),
    )
    seen: list[str] = []
    done = asyncio.Event()

    async def ask() -> None:
        while not done.is_set():
            answers = await model.rank(REQUESTS)
            assert {type(answer) for answer in answers} == {RankedList}, answers
            seen.extend(dict.fromkeys(answer.model_version for answer in answers))

    await model.load()
    asking = asyncio.create_task(ask())
    try:
        for version in (retrieval_version.NAME, ranking, retrieval_version.NAME):
            ours.promote(version)
            assert await model.load() and model.version == version
        ours.canary(ranking, 50.0)
        assert await model.load()
        answers = await model.rank(REQUESTS)
        arms = {answer.model_version for answer in answers if isinstance(answer, RankedList)}
        assert arms == {ranking, retrieval_version.NAME}
    finally:
        done.set()
        await asking
        await model.close()
    changes = [one for before, one in zip(["", *seen], seen, strict=False) if one != before]
    assert changes[:3] == [ranking, retrieval_version.NAME, ranking]
