"""What is made of versions before they are opened: verified each time, kept, and made by another process."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest

from compression.releases.registry import Artefact, Registry
from features.settings import FeatureSettings
from inference import engines, plane, preparing
from inference import prepared as prepared_versions
from inference.engines import model_file
from inference.engines.base import INPUTS, WEIGHTS, EngineOptions, graphs_of, inputs_of
from inference.engines.calibration import draw
from inference.errors import ModelUnavailable
from inference.prepared import MOST_KEPT, RECORD, Prepared, Wanted, prepare
from inference.preparing import Preparer
from inference.ranker import Ranker
from inference.settings import InferenceSettings
from inference.types import RankedList, RankRequest
from tests.inference.conftest import ITEMS, sequence
from tests.support import eventually

OPTIONS = EngineOptions()
SETTINGS = InferenceSettings(
    engine="onnx", runners=2, spares=1, histories=(10,), candidate_sizes=(50,), batches=(1, 4)
)
REQUESTS = [RankRequest(user, sequence(ITEMS[user : user + 5].tolist())) for user in range(8)]


@pytest.fixture
def wanted(registry, tmp_path) -> Wanted:
    """The version of these tests, in a registry of its own that may be damaged."""
    root = tmp_path / "models"
    shutil.copytree(registry.root, root)
    return Wanted(str(root), "serving", None, (("onnx", OPTIONS),), True, 100, 8)


@pytest.fixture
def made(monkeypatch) -> list[Path]:
    """Where engines have prepared something, in order."""
    from inference.engines.onnx_engine import OnnxEngine

    folders: list[Path] = []
    real = OnnxEngine.prepare

    def counted(self, artefact, graphs, folder):
        folders.append(folder)
        real(self, artefact, graphs, folder)

    monkeypatch.setattr(OnnxEngine, "prepare", counted)
    return folders


def test_what_was_prepared_computes_what_was_published(wanted, tmp_path):
    artefact = Registry(wanted.registry).open("serving")
    folder = prepare(wanted, tmp_path / "cache").of_engine("onnx", OPTIONS)
    as_published, as_prepared = engines.create("onnx", OPTIONS), engines.create("onnx", OPTIONS)
    graphs = graphs_of(as_published, cached=True, artefact=artefact)
    as_published.load(artefact, graphs)
    as_prepared.load_prepared(artefact.manifest.model, graphs, folder)
    rng = np.random.default_rng(3)
    drawn = draw(artefact.vocabulary(), users=4, history=20, candidates=50, rng=rng)
    asked = {name: drawn[name] for name in INPUTS["encode"]}
    drawn |= as_published.run("encode", asked)
    scored = {name: drawn[name] for name in inputs_of("score", artefact.manifest.model)}
    for graph, inputs in (("encode", asked), ("score", scored)):
        for name, output in as_published.run(graph, inputs).items():
            np.testing.assert_allclose(as_prepared.run(graph, inputs)[name], output, atol=1e-5)


def test_graphs_have_their_weights_in_one_file_and_once(wanted, tmp_path):
    folder = prepare(wanted, tmp_path / "cache").of_engine("onnx", OPTIONS)
    assert {path.name for path in folder.iterdir()} == {"weights", "encode.onnx", "score.onnx", "append.onnx"}
    tables = [
        {entry.key: entry.value for entry in tensor.external_data}
        for path in sorted(folder.glob("*.onnx"))
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        if tensor.name == "items.weight"
    ]
    assert len(tables) == 3 and tables[0] == tables[1] == tables[2]
    assert tables[0]["location"] == "weights"


def test_an_engine_beside_another_answers_like_it_and_outlives_it(wanted, tmp_path):
    prepared = prepare(wanted, tmp_path / "cache")
    ranker = Ranker.open(wanted.registry, settings=SETTINGS, prepared=prepared)
    one = ranker.warm("onnx")
    other = ranker.beside(one)
    assert other.engine is not one.engine
    one.close()
    ranker.check(other)


def test_what_is_whole_is_not_made_again(wanted, made, tmp_path):
    first, second = prepare(wanted, tmp_path / "cache"), prepare(wanted, tmp_path / "cache")
    assert first == second
    assert len(made) == 1
    prepare(replace(wanted, exact_until=200), tmp_path / "cache")
    prepare(replace(wanted, engines=(("onnx", EngineOptions(threads=2)),)), tmp_path / "cache")
    assert len(made) == 3


@pytest.mark.parametrize("moment", ["before it looks", "before it renames"])
def test_two_processes_that_begin_together_both_have_what_the_faster_one_made(
    wanted, tmp_path, monkeypatch, moment
):
    """Two workers that start with nothing prepared: to rename onto a folder that is not empty is an error."""
    cache, others = tmp_path / "cache", []
    read_all, rmtree = Artefact.read_all, shutil.rmtree

    def meanwhile() -> None:
        monkeypatch.undo()
        others.append(prepare(wanted, cache))

    def read(artefact: Artefact) -> None:
        read_all(artefact)
        meanwhile()

    def tidied(folder: Path, **how: bool) -> None:
        rmtree(folder, **how)
        meanwhile()

    if moment == "before it looks":
        monkeypatch.setattr(Artefact, "read_all", read)
    else:
        monkeypatch.setattr(shutil, "rmtree", tidied)
    mine = prepare(wanted, cache)
    assert others == [mine]
    assert prepared_versions._is_whole(
        mine.folder, prepared_versions._made_from(Registry(wanted.registry).open(), wanted)
    )
    assert sorted(mine.folder.parent.iterdir()) == [mine.folder]


@pytest.mark.parametrize("damage", ["changed", "longer", "added", "removed", "no record", "a link", "claims"])
def test_what_is_not_whole_is_made_again(wanted, made, tmp_path, damage):
    prepared = prepare(wanted, tmp_path / "cache")
    weights = next(prepared.folder.rglob("weights"))
    whole = weights.read_bytes()
    if damage == "changed":
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "longer":
        weights.write_bytes(whole + b"\0")
    elif damage == "added":
        (weights.parent / "more").write_bytes(b"")
    elif damage == "removed":
        weights.unlink()
    elif damage == "no record":
        (prepared.folder / RECORD).unlink()
    elif damage == "a link":
        weights.rename(tmp_path / "elsewhere")
        weights.symlink_to(tmp_path / "elsewhere")
    else:
        record = prepared.folder / RECORD
        record.write_text(record.read_text().replace('"exact_until": 100', '"exact_until": 99'))
    assert prepare(wanted, tmp_path / "cache") == prepared
    assert len(made) == 2
    assert weights.read_bytes() == whole and not weights.is_symlink()


def test_a_version_that_was_changed_is_refused_although_it_was_prepared_before(wanted, tmp_path):
    prepared = prepare(wanted, tmp_path / "cache")
    file = Path(wanted.registry) / "versions" / prepared.version / "score.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(ModelUnavailable, match=r"score\.onnx is not the file that was published"):
        prepare(wanted, tmp_path / "cache")
    with pytest.raises(ModelUnavailable, match="announced with checksum"):
        prepare(replace(wanted, sha256="0" * 64), tmp_path / "cache")


def test_of_a_version_whose_other_files_were_changed_nothing_is_kept(wanted, tmp_path):
    file = Path(wanted.registry) / "versions" / Registry(wanted.registry).resolve("serving") / WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelUnavailable, match=f"{WEIGHTS} is not the file that was published"):
        prepare(wanted, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_graphs_are_looked_at_once_for_all_times_under_the_same_rules(wanted, tmp_path, monkeypatch):
    looked_at: list[str] = []
    monkeypatch.setattr(model_file, "check_graph", lambda _, graph, __: looked_at.append(graph))
    prepare(wanted, tmp_path / "cache")
    assert sorted(looked_at) == ["append", "encode", "score"]
    prepare(wanted, tmp_path / "cache")
    assert len(looked_at) == 3

    def refuse(_: bytes, graph: str, __: object) -> None:
        raise ModelUnavailable(f"the {graph} graph is refused")

    monkeypatch.setattr(model_file, "check_graph", refuse)
    monkeypatch.setattr(prepared_versions, "_rules", lambda: "others")
    with pytest.raises(ModelUnavailable, match="graph is refused"):
        prepare(wanted, tmp_path / "cache")


def test_of_many_versions_the_latest_used_are_kept(wanted, tmp_path):
    kept = [prepare(replace(wanted, exact_until=number), tmp_path / "cache").folder for number in range(3)]
    for age, folder in enumerate(kept):
        os.utime(folder, (1_000 - age, 1_000 - age))
    for number in range(3, MOST_KEPT + 2):
        prepare(replace(wanted, exact_until=number), tmp_path / "cache")
    assert [folder.is_dir() for folder in kept] == [True, False, False]


def test_what_was_tidied_away_is_loaded_as_it_was_published(wanted, tmp_path):
    prepared = prepare(wanted, tmp_path / "cache")
    ranker = Ranker.open(wanted.registry, settings=SETTINGS, prepared=prepared)
    for file in prepared.of_engine("onnx", OPTIONS).iterdir():
        file.unlink()
    ranker.check(ranker.warm("onnx"))


def test_files_that_were_tidied_away_are_let_go_of_after_all_that_maps_them(wanted, tmp_path, monkeypatch):
    prepared = prepare(wanted, tmp_path / "cache")
    ranker = Ranker.open(wanted.registry, settings=SETTINGS, prepared=prepared)
    version = plane.Version(ranker)
    version.warmed["onnx-0"] = ranker.warm("onnx")
    del ranker
    weights = prepared.of_engine("onnx", OPTIONS) / "weights"
    shutil.rmtree(prepared.folder)

    def mapped() -> bool:
        return f"{weights} (deleted)" in Path("/proc/self/maps").read_text()

    def opened() -> bool:
        return any(str(weights) in os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())

    seen: list[tuple[bool, bool]] = []
    close = os.close

    def noticed(descriptor: int) -> None:
        seen.append((mapped(), opened()))
        close(descriptor)

    monkeypatch.setattr(os, "close", noticed)
    assert mapped() and opened()
    version.free()
    assert seen[0] == (False, True)
    assert not opened()


def test_another_process_prepares_and_is_kept(wanted, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    preparer = Preparer(patience_s=600.0)
    try:
        prepared = Prepared.from_json(preparer.prepare(wanted.to_json(), lambda: False))
        assert prepared == prepare(wanted)
        process = preparer._child.pid
        with pytest.raises(ModelUnavailable, match="no version or alias 'nobody'"):
            preparer.prepare(replace(wanted, version="nobody").to_json(), lambda: False)
        assert preparer._child.pid == process
        (worker,) = psutil.Process(process).children()
        assert os.sched_getscheduler(worker.pid) == os.SCHED_IDLE
        preparer._child.kill()
        preparer._child.wait()
        assert psutil.wait_procs([worker], timeout=10)[0] == [worker]
        assert Prepared.from_json(preparer.prepare(wanted.to_json(), lambda: False)) == prepared
    finally:
        preparer.close()


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not tell")
@pytest.mark.parametrize("beside", [False, True])
def test_who_prepares_has_no_more_than_its_share_of_a_processor(tmp_path, beside):
    lines = (
        "import os, sys",
        "from inference import preparing",
        "worker = os.fork()",
        "while not worker: pass",
        "preparing._supervise(worker, int(sys.argv[1]))",
    )
    (tmp_path / "told").write_bytes(preparing._SOMEBODY if beside else preparing._NOBODY)
    told = os.open(tmp_path / "told", os.O_RDWR)
    supervisor = subprocess.Popen([sys.executable, "-c", "\n".join(lines), str(told)], pass_fds=[told])
    try:
        found = psutil.Process(supervisor.pid)
        eventually(lambda: len(found.children()) == 1)
        (worker,) = found.children()
        eventually(lambda: worker.status() == psutil.STATUS_STOPPED)
        began_s, had_s = time.monotonic(), preparing._ran_s(worker.pid)
        eventually(lambda: preparing._ran_s(worker.pid) - had_s > 0.1, timeout_s=60)
        share = (preparing._ran_s(worker.pid) - had_s) / (time.monotonic() - began_s)
        assert share < 1.5 * (preparing._SHARE_BESIDE if beside else preparing._SHARE)
        worker.kill()
        assert supervisor.wait(10) == 0
    finally:
        for child in psutil.Process(supervisor.pid).children() if supervisor.poll() is None else []:
            child.kill()
        supervisor.kill()
        supervisor.wait()
        os.close(told)


def test_a_child_is_told_whether_anybody_is_served(wanted, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    preparer = Preparer()
    told: list[bytes] = []
    answers = iter([True, False])

    def serving() -> bool:
        told.append(os.pread(preparer._told.fileno(), 1, 0))
        return next(answers, False)

    try:
        preparer.prepare(wanted.to_json(), lambda: False, serving)
        assert told[1:3] == [preparing._SOMEBODY, preparing._NOBODY]
    finally:
        preparer.close()


async def test_the_plane_knows_whether_it_was_asked_of_late(wanted, statistics):
    ours = plane.Plane(SETTINGS, FeatureSettings(), statistics)
    try:
        opened = await ours.open(wanted.registry, "serving")
        assert not ours._is_asked()
        await ours.rank(REQUESTS, opened)
        assert ours._is_asked()
        assert not ours._is_asked()
        asking = asyncio.ensure_future(ours.rank(REQUESTS, opened))
        await asyncio.sleep(0)
        assert ours._is_asked() and ours._is_asked()
        await asking
    finally:
        await ours.close()


def test_what_a_process_that_was_killed_had_begun_to_write_goes_in_the_end(wanted, tmp_path):
    cache = tmp_path / "cache"
    prepare(wanted, cache)
    left, being_made = (cache / f".making-{name}" for name in ("left", "now"))
    for folder in (left, being_made):
        folder.mkdir()
        (folder / "index").write_bytes(b"half of it")
    two_hours_ago = time.time() - 7_200
    os.utime(left, (two_hours_ago, two_hours_ago))
    prepare(wanted, cache)
    assert not left.exists()
    assert being_made.exists()


def test_a_process_that_has_no_turn_is_followed_by_one_that_has(wanted, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    preparer = Preparer(patience_s=0.0)
    assert Prepared.from_json(preparer.prepare(wanted.to_json(), lambda: False)).index.is_file()
    assert preparer._child is None


def test_a_process_that_has_its_turns_is_waited_for(wanted, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Far shorter than importing takes; what it works for is told in its place.
    preparer = Preparer(patience_s=0.05)
    monkeypatch.setattr(preparer, "_had_s", lambda: 0.5 * time.monotonic())
    try:
        assert Prepared.from_json(preparer.prepare(wanted.to_json(), lambda: False)).index.is_file()
        assert preparer._child is not None
    finally:
        preparer.close()


def test_what_a_process_has_worked_is_known(wanted, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    preparer = Preparer(patience_s=600.0)
    try:
        preparer.prepare(wanted.to_json(), lambda: False, lambda: False)
        assert 0.05 < preparer._had_s() < 60
    finally:
        preparer.close()


def test_nobody_waits_for_a_version_that_is_not_needed_any_more(wanted):
    preparer = Preparer()
    with pytest.raises(ModelUnavailable, match="not needed any more"):
        preparer.prepare(wanted.to_json(), lambda: True)
    assert preparer._child is None


async def test_a_version_beside_one_that_serves_is_prepared_elsewhere(wanted, statistics, monkeypatch):
    ours = plane.Plane(SETTINGS, FeatureSettings(), statistics)
    try:
        first = await ours.open(wanted.registry, "serving")

        def here(_: Wanted) -> Prepared:
            raise AssertionError("prepared by the process that serves")

        monkeypatch.setattr(plane, "prepare", here)
        second = await ours.open(wanted.registry, "serving")
        answers = [await ours.rank(REQUESTS, version) for version in (first, second)]
        assert [answer.items for answer in answers[0]] == [answer.items for answer in answers[1]]
        shutil.rmtree(Path(wanted.registry) / "versions" / first.version)
        with pytest.raises(ModelUnavailable):
            await ours.open(wanted.registry, "serving")
    finally:
        await ours.close()


async def test_spares_share_no_session_with_the_lanes(wanted, statistics):
    ours = plane.Plane(SETTINGS, FeatureSettings(), statistics)
    try:
        opened = await ours.open(wanted.registry, "serving")
        await ours.settled()
        (spares,) = opened.spares.values()
        lanes = [opened.warmed[name].engine for name in ("onnx-0", "onnx-1")]
        assert lanes[0]._sessions == lanes[1]._sessions
        assert not set(spares[0].engine._sessions.values()) & set(lanes[0]._sessions.values())
    finally:
        await ours.close()


async def test_where_nothing_can_be_kept_versions_are_opened_all_the_same(
    wanted, statistics, tmp_path, monkeypatch
):
    (tmp_path / "tailrace" / "prepared").mkdir(parents=True)
    (tmp_path / "tailrace" / "prepared").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ModelUnavailable, match="can be written by others"):
        prepare(wanted)
    ours = plane.Plane(SETTINGS, FeatureSettings(), statistics)
    try:
        opened = await ours.open(wanted.registry, "serving")
        assert all(isinstance(answer, RankedList) for answer in await ours.rank(REQUESTS, opened))
    finally:
        await ours.close()
