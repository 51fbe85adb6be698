"""Versions on lanes: opened beside those that serve, and gone when they are freed."""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
import time
import weakref

import pytest

from compression.releases.registry import Registry
from features.settings import FeatureSettings
from inference import plane as planes
from inference.engines.base import Engine
from inference.errors import EngineFailed, ModelUnavailable
from inference.plane import Plane, Version
from inference.ranker import Ranker
from inference.settings import InferenceSettings
from inference.types import RankedList, RankRequest
from inference.user_cache import UserCache
from tests.inference.conftest import ITEMS, sequence
from tests.support import eventually_async

SETTINGS = InferenceSettings(
    engine="onnx", runners=2, spares=1, histories=(10,), candidate_sizes=(50,), batches=(1, 4)
)
REQUESTS = [RankRequest(user, sequence(ITEMS[user : user + 5].tolist())) for user in range(8)]


@pytest.fixture
def versions(registry, tmp_path):
    """A registry with the version and a twin of it."""
    root = tmp_path / "models"
    first = registry.resolve("serving")
    shutil.copytree(registry.root, root)
    staging = tmp_path / "staging"
    shutil.copytree(root / "versions" / first, staging, ignore=shutil.ignore_patterns("manifest.json"))
    ours = Registry(root)
    ours.publish(staging, ours.manifest(first).model_copy(update={"version": "twin"}))
    return root, first, "twin"


@pytest.fixture
async def plane(statistics):
    made = Plane(SETTINGS, FeatureSettings(), statistics)
    yield made
    await made.close()


async def test_a_version_that_is_retired_is_gone_without_a_collection(plane, versions):
    root, first, second = versions
    await plane.open(root, first)
    gc.collect()
    gc.disable()
    try:
        opened = await plane.open(root, second)
        assert all(isinstance(answer, RankedList) for answer in await plane.rank(REQUESTS, opened))
        left = [weakref.ref(opened), weakref.ref(opened.ranker)]
        left += [weakref.ref(warmed.engine) for warmed in opened.warmed.values()]
        await plane.retire(opened)
        del opened
        await eventually_async(lambda: not any(ref() for ref in left))
    finally:
        gc.enable()


async def test_what_served_before_is_freed_when_the_next_version_has_caught_its_breath(
    plane, versions, monkeypatch
):
    root, first, second = versions
    before, serving = await plane.open(root, first), await plane.open(root, second)
    freed_s, free = [], Version.free
    monkeypatch.setattr(Version, "free", lambda self, rest: (freed_s.append(time.monotonic()), free(self)))
    monkeypatch.setattr(planes, "_BREATH_S", 0.1)
    began_s = time.monotonic()
    await plane.retire(before)
    assert freed_s[0] - began_s >= 0.1
    # Nobody is left who could want one.
    monkeypatch.setattr(planes, "_BREATH_S", 600.0)
    await asyncio.wait_for(plane.retire(serving), 60)
    assert len(freed_s) == 2


async def test_who_frees_a_version_rests_between_its_engines(plane, versions):
    root, first, _ = versions
    version = await plane.open(root, first)
    await plane.settled()
    (spares,) = version.spares.values()
    engines = [warmed.engine for warmed in (*version.warmed.values(), *spares)]
    left: list[int] = []

    def rest() -> bool:
        left.append(sum(1 for engine in engines if engine._sessions))
        return False

    version.free(rest)
    plane._versions.remove(version)
    assert left == [2, 1, 0]


async def test_a_lane_that_became_slow_alone_continues_on_the_spare(plane, versions, monkeypatch):
    root, first, _ = versions
    version = await plane.open(root, first)
    await plane.settled()
    slow, other = plane.batcher.dispatcher.lanes
    before = {lane.name: version.warmed[lane.name] for lane in (slow, other)}
    (spares,) = version.spares.values()
    (spare,) = spares
    engine = before[slow.name].engine
    run = engine.run
    monkeypatch.setattr(engine, "run", lambda *told: (time.sleep(0.05), run(*told))[1])
    for _ in range(3):
        slow.profile.observe(4, 0.1 + 10 * slow.profile.predict(4))
    plane.batcher._health.refresh_slow()
    await eventually_async(lambda: version.warmed[slow.name] is spare)
    assert version.warmed[other.name] is before[other.name] and not spares
    assert slow.profile.scale == 1.0 and not slow.out
    await plane.settled()
    assert len(spares) == 1 and spares[0].engine not in [warmed.engine for warmed in version.warmed.values()]


async def test_a_probe_that_had_to_wait_once_says_that_the_lane_is_well(plane, versions, monkeypatch):
    root, first, _ = versions
    version = await plane.open(root, first)
    engine, waits_s = version.warmed["onnx-0"].engine, [0.3]
    run = engine.run

    def waiting(*told):
        time.sleep(waits_s.pop() if waits_s else 0.0)
        return run(*told)

    monkeypatch.setattr(engine, "run", waiting)
    once = plane._probe("onnx-0")
    waits_s += [0.3] * 20
    assert plane._probe("onnx-0") > 2 * once


async def test_engines_like_one_that_was_timed_run_each_shape_once(plane, versions, monkeypatch):
    root, first, second = versions
    repeats = []
    warm_up = Engine.warm_up

    def counted(self, shapes, *, repeats_=3, **told):
        repeats.append(told.get("repeats", repeats_))
        return warm_up(self, shapes, **told)

    monkeypatch.setattr(Engine, "warm_up", counted)
    one = await plane.open(root, first)
    other = await plane.open(root, second)
    assert repeats[:2] == [3, 1]
    assert set(repeats[1:]) == {1}
    assert other.warmed["onnx-1"].buckets.cost_s == one.warmed["onnx-0"].buckets.cost_s != {}


async def test_a_version_has_room_for_the_users_of_the_one_that_serves(plane, versions, monkeypatch):
    root, first, second = versions
    wanted = []
    make_room = UserCache.make_room
    monkeypatch.setattr(
        UserCache, "make_room", lambda self, users: (wanted.append(users), make_room(self, users))[1]
    )
    serving = await plane.open(root, first)
    await plane.rank(REQUESTS, serving)
    await plane.open(root, second)
    assert wanted == [0, len(REQUESTS)]


async def test_a_rehearsal_is_no_lane_s_matter_whatever_comes_of_it(plane, versions, monkeypatch):
    root, first, second = versions
    serving, coming = await plane.open(root, first), await plane.open(root, second)
    threads = []
    rank = Ranker.rank

    def fails(self, *told):
        threads.append(threading.current_thread().name)
        if self.version == second:
            raise EngineFailed("it fell over")
        return rank(self, *told)

    monkeypatch.setattr(Ranker, "rank", fails)
    for _ in range(5):
        assert {str(answer) for answer in await plane.rehearse(REQUESTS, coming)} == {"it fell over"}
    assert {name.split("_")[0] for name in threads} == {"warming"}
    assert not any(lane.failures or lane.out for lane in plane.batcher.dispatcher.lanes)
    assert all(isinstance(answer, RankedList) for answer in await plane.rank(REQUESTS, serving))


async def test_a_version_that_is_not_well_takes_no_lane_from_the_one_that_serves(
    plane, versions, monkeypatch
):
    root, first, second = versions
    serving, canary = await plane.open(root, first), await plane.open(root, second)
    for _ in range(4):
        await asyncio.gather(*(plane.rank([request], serving) for request in REQUESTS))
    rank = Ranker.rank

    def fails(self, *told):
        if self.version == second:
            raise EngineFailed("it fell over")
        return rank(self, *told)

    monkeypatch.setattr(Ranker, "rank", fails)
    for _ in range(10):
        assert all(isinstance(answer, EngineFailed) for answer in await plane.rank(REQUESTS[:1], canary))
    assert not any(lane.out for lane in plane.batcher.dispatcher.lanes)
    assert all(isinstance(answer, RankedList) for answer in await plane.rank(REQUESTS, serving))


async def test_a_version_with_another_checksum_than_promised_is_not_opened(plane, versions):
    root, first, _ = versions
    with pytest.raises(ModelUnavailable, match="announced with checksum"):
        await plane.open(root, first, sha256="0" * 64)
    await plane.open(root, first, sha256=Registry(root).manifest_sha256(first))


async def test_only_opening_beside_a_version_that_serves_rests_in_between(plane, versions, monkeypatch):
    root, first, second = versions
    rests = []
    monkeypatch.setattr(plane._closing, "wait", rests.append)
    await plane.open(root, first)
    first_spare = list(plane._tasks)
    assert rests == []
    for task in first_spare:
        await task
    rests.clear()
    await plane.open(root, second)
    assert len(rests) > len(list(SETTINGS.buckets().shapes()))
    assert all(0 <= rest_s <= 0.5 for rest_s in rests)


async def test_who_opens_a_version_rests_longer_where_somebody_is_served(plane, versions, monkeypatch):
    root, first, _ = versions
    version = await plane.open(root, first)
    await plane.settled()
    rests = []
    monkeypatch.setattr(plane._closing, "wait", rests.append)
    for served in (False, True, False):
        if served:
            await plane.rank(REQUESTS, version)
        plane._began_s = time.thread_time() - 0.01
        plane._rest()
    alone, beside, again = rests
    assert beside > 4 * max(alone, again)


async def test_closing_in_the_middle_of_opening_does_not_wait_for_it(statistics, versions, monkeypatch):
    root, first, second = versions
    plane = Plane(SETTINGS, FeatureSettings(), statistics)
    await plane.open(root, first)
    resting = threading.Event()
    monkeypatch.setattr(plane, "_rest", lambda: resting.set() or plane._closing.wait(30))
    opening = asyncio.ensure_future(plane.open(root, second))
    await asyncio.to_thread(resting.wait, 10)
    began_s = time.monotonic()
    await plane.close()
    with pytest.raises((ModelUnavailable, RuntimeError, asyncio.CancelledError)):
        await opening
    assert time.monotonic() - began_s < 10
