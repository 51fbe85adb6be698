"""Plans that are kept, and the TensorRT engine on a GPU of ordinary memory (`fake_tensorrt`)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compression.releases.registry import Artefact
from inference import engines
from inference.engines.base import Engine, EngineOptions, Shape
from inference.engines.calibration import samples
from inference.engines.plan_cache import PlanCache, PlanKey
from inference.errors import EngineFailed, ModelUnavailable
from inference.types import Graph, Tensors
from tests.inference import fake_tensorrt

KEY = PlanKey("a" * 64, "A GPU", "9.0", "10.16", "f16", {"items": ((1, 4), (8, 100))})


def test_a_plan_is_found_again_by_all_that_it_was_made_from(tmp_path: Path) -> None:
    PlanCache(tmp_path / "plans").put(KEY, b"a plan")
    cache = PlanCache(tmp_path / "plans")
    assert cache.get(KEY) == b"a plan"
    assert {path.stat().st_mode & 0o777 for path in cache.folder.iterdir()} == {0o600}
    for other in (
        replace(KEY, onnx_sha256="b" * 64),
        replace(KEY, gpu="Another"),
        replace(KEY, capability="8.0"),
        replace(KEY, tensorrt="10.17"),
        replace(KEY, precision="f32"),
        replace(KEY, profile={"items": ((1, 4), (8, 200))}),
    ):
        assert cache.get(other) is None


def test_a_plan_that_is_not_the_one_its_record_names_is_never_loaded(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)
    plan = tmp_path / f"{KEY.digest()}.plan"
    record = tmp_path / f"{KEY.digest()}.json"
    cache.put(KEY, b"a plan")
    plan.write_bytes(b"a plot")
    assert cache.get(KEY) is None
    cache.put(KEY, b"a plan")
    plan.write_bytes(b"a pla")
    assert cache.get(KEY) is None
    cache.put(KEY, b"a plan")
    record.unlink()
    assert cache.get(KEY) is None
    other = replace(KEY, gpu="Another")
    cache.put(other, b"a plan")
    record.write_bytes((tmp_path / f"{other.digest()}.json").read_bytes())
    assert cache.get(KEY) is None
    cache.put(KEY, b"a plan")
    elsewhere = tmp_path / "elsewhere"
    plan.rename(elsewhere)
    plan.symlink_to(elsewhere)
    assert cache.get(KEY) is None
    for broken in (b"", b"[]", b"{", b'{"sha256": 3}'):
        record.write_bytes(broken)
        assert cache.get(KEY) is None


def test_a_folder_that_others_can_write_to_keeps_no_plans(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ModelUnavailable, match="written by others"):
        PlanCache(tmp_path)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, module in fake_tensorrt.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "inference.engines.tensorrt_engine", raising=False)
    fake_tensorrt.builds.clear()
    yield
    sys.modules.pop("inference.engines.tensorrt_engine", None)


def tensorrt(plans: Path, **options: Any) -> Engine:
    module = importlib.import_module("inference.engines.tensorrt_engine")
    engine: Engine = module.TensorRtEngine(EngineOptions(plans=str(plans), **options))
    return engine


GRAPHS: tuple[Graph, ...] = ("encode", "score")
SHAPES = [Shape(graph, batch, history, 50) for graph in GRAPHS for batch, history in ((1, 4), (8, 70))]


@pytest.mark.usefixtures("fake_gpu")
def test_tensorrt_answers_warmed_shapes_and_what_lies_between(artefact: Artefact, tmp_path: Path) -> None:
    engine, reference = tensorrt(tmp_path), engines.create("onnx")
    for some in (engine, reference):
        some.load(artefact, ("encode", "score"))
    with pytest.raises(EngineFailed, match="not been warmed"):
        engine.run("encode", reference.example(SHAPES[0]))
    engine.warm_up(SHAPES)
    for graph in GRAPHS:
        for given in samples(artefact, graph, batches=3):
            if given["candidates" if graph == "score" else "items"].shape[1] < 4 or _slots(given) < 4:
                continue
            actual, expected = engine.run(graph, given), reference.run(graph, given)
            for name in expected:
                assert np.array_equal(actual[name], expected[name])
    with pytest.raises(EngineFailed, match="not warmed"):
        engine.run("encode", engine.example(Shape("encode", 9, 4, 0)))
    engine.close()
    engine.close()


def _slots(given: Tensors) -> int:
    return given["key_0" if "key_0" in given else "items"].shape[1]


@pytest.mark.usefixtures("fake_gpu")
def test_tensorrt_builds_once_for_a_precision_and_its_shapes(artefact: Artefact, tmp_path: Path) -> None:
    def start(shapes: list[Shape], **options: Any) -> int:
        before = len(fake_tensorrt.builds)
        engine = tensorrt(tmp_path, **options)
        engine.load(artefact, ("encode", "score"))
        engine.warm_up(shapes, repeats=1)
        engine.close()
        return len(fake_tensorrt.builds) - before

    assert start(SHAPES) == 2
    assert start(SHAPES) == 0
    assert start([*SHAPES, Shape("encode", 16, 70, 0)]) == 1
    assert start(SHAPES, precision="int8") == 2
    assert start(SHAPES, precision="int8") == 0
    assert fake_tensorrt.builds[0] == ""
    assert {"FP16", "INT8"} <= set(fake_tensorrt.builds[-1].split(","))
    next(tmp_path.glob("*.plan")).write_bytes(b"not what was built")
    assert start(SHAPES) + start(SHAPES, precision="int8") + start([*SHAPES, Shape("encode", 16, 70, 0)]) == 1
