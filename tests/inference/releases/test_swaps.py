"""A process that swaps versions for weeks holds as much as one that has swapped once."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from prometheus_client import CollectorRegistry

from compression.releases.registry import Registry
from features.settings import FeatureSettings
from inference import plane as planes
from inference import prepared
from inference.plane import Plane
from inference.releases.metrics import ReleaseMetrics
from inference.releases.serving import ServingModel
from inference.releases.settings import ReleaseRules
from inference.settings import InferenceSettings
from inference.types import RankedList, RankRequest
from tests.inference.conftest import ITEMS, sequence

SETTINGS = InferenceSettings(
    engine="onnx", runners=2, spares=1, histories=(10,), candidate_sizes=(50,), batches=(1, 4)
)
REQUESTS = [RankRequest(user, sequence(ITEMS[user : user + 5].tolist())) for user in range(8)]
SWAPS = prepared.MOST_KEPT + 1


@pytest.fixture
def names(registry, tmp_path):
    """As many versions of the registry in `tmp_path` as swaps, and the one that serves first."""
    root = tmp_path / "models"
    first = registry.resolve("serving")
    shutil.copytree(registry.root, root)
    staging = tmp_path / "staging"
    shutil.copytree(root / "versions" / first, staging, ignore=shutil.ignore_patterns("manifest.json"))
    ours = Registry(root)
    made = [f"number-{number}" for number in range(SWAPS)]
    for name in made:
        # Nothing reads this, but what is prepared of a version depends on every file of it.
        with (staging / "recipe.txt").open("a") as file:
            file.write(" ")
        ours.publish(staging, ours.manifest(first).model_copy(update={"version": name}))
    return [first, *made]


@contextmanager
def _no_collection() -> Iterator[None]:
    """What waits for a collection in a cycle is held, too: a worker collects rarely."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def test_after_many_swaps_nothing_is_left_of_the_versions_before(
    names, tmp_path, statistics, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, samples = Registry(tmp_path / "models"), CollectorRegistry()
    plane = Plane(SETTINGS, FeatureSettings(), statistics)
    model = ServingModel(plane, ReleaseRules(root.root, keep_previous=False), ReleaseMetrics(samples))
    gone: list[weakref.ref[object]] = []
    held_when_given_back: list[int] = []
    give_back = planes.give_back

    def noticed() -> None:
        held_when_given_back.append(sum(ref() is not None for ref in gone))
        give_back()

    monkeypatch.setattr(planes, "give_back", noticed)
    try:
        await model.load()
        with _no_collection():
            for name in names[1:]:
                answers = await model.rank(REQUESTS)
                assert {type(answer) for answer in answers} == {RankedList}
                del answers
                await plane.settled()
                gone += _parts(plane)
                root.promote(name)
                assert await model.load()
                await model.settled()
                await plane.settled()
                assert not [ref() for ref in gone if ref() is not None]
    finally:
        await model.close()
    # Not only in the end: what is freed after memory was given back stays with the allocator.
    assert held_when_given_back[:SWAPS] == [0] * SWAPS
    labelled = [
        sample.labels["version"]
        for metric in samples.collect()
        for sample in metric.samples
        if "version" in sample.labels
    ]
    assert set(labelled) <= {names[-1]}
    kept = list((tmp_path / "cache" / "tailrace" / "prepared").iterdir())
    assert len(kept) == prepared.MOST_KEPT


def _parts(plane: Plane) -> list[weakref.ref[object]]:
    """The one version that is open, and what is large in it."""
    (version,) = plane.versions
    ranker = version.ranker
    spares = [warmed for kept in version.spares.values() for warmed in kept]
    engines = [warmed.engine for warmed in (*version.warmed.values(), *spares)]
    cache = ranker._encoder._cache
    assert cache is not None and len(engines) == 3
    large = (ranker, ranker._index, ranker._lookup, cache, cache._states, *engines)
    return [weakref.ref(one) for one in large]
