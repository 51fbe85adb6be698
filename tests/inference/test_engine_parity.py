"""Every usable engine answers like torch, on every graph, within the tolerance of its precision."""

from __future__ import annotations

import numpy as np
import pytest

from compression.releases.registry import Artefact
from inference import engines
from inference.engines.base import TOLERANCE, Engine, EngineOptions, Precision, Shape, outputs_of
from inference.errors import EngineFailed, ModelUnavailable
from inference.types import Graph, Tensors

EVERY_GRAPH: tuple[Graph, ...] = ("encode", "score", "rank", "append")
SHAPES = [(1, 1, 1), (1, 4, 50), (5, 10, 7), (8, 70, 50)]
USABLE = [status for status in engines.usable() if status.usable]
ENGINES: list[tuple[str, Precision]] = [
    (status.name, precision) for status in USABLE for precision in status.precisions
]


def created(name: str, precision: Precision) -> Engine:
    """On this machine's CPU, or skipped where it does not compute in the precision."""
    try:
        return engines.create(name, EngineOptions(precision=precision))
    except ModelUnavailable as refusal:
        if precision in ("f32", "int8") or (name, precision) == ("torch", "bf16"):
            raise
        pytest.skip(str(refusal))


def inputs(engine: Engine, shape: Shape, seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    given = engine.example(shape)
    rows = {
        "items": engine.model.item_rows,
        "categories": engine.model.category_rows,
        "behaviors": 5,
        "gaps": 32,
    }
    rows |= {"candidates": rows["items"], "candidate_categories": rows["categories"]}
    longest = int(given["lengths"][0])
    lengths = rng.integers(0, longest + 1, shape.batch)
    lengths[0] = longest
    lengths[-1] = 0 if shape.batch > 1 else longest
    for name, array in given.items():
        if name in rows:
            given[name] = rng.integers(1, rows[name], array.shape).astype(np.int32)
        elif array.dtype == np.float32:
            # Keys carry the scale of the dot product.
            scale = engine.model.dim**-0.5 if name.startswith("key") else 1.0
            given[name] = (scale * rng.normal(size=array.shape)).astype(np.float32)
    given["lengths"] = lengths.astype(np.int32)
    return given


@pytest.fixture(scope="module")
def torch_engine(artefact: Artefact) -> Engine:
    engine = engines.create("torch")
    engine.load(artefact, EVERY_GRAPH)
    return engine


@pytest.mark.parametrize(("name", "precision"), ENGINES)
def test_an_engine_answers_like_torch(
    name: str, precision: Precision, artefact: Artefact, torch_engine: Engine
) -> None:
    engine = created(name, precision)
    engine.load(artefact, EVERY_GRAPH)
    for graph in EVERY_GRAPH:
        for seed, (batch, history, candidates) in enumerate(SHAPES):
            given = inputs(engine, Shape(graph, batch, history, candidates), seed)
            expected, actual = torch_engine.run(graph, dict(given)), engine.run(graph, dict(given))
            seen = np.arange(history) < given["lengths"][:, None]
            for output in outputs_of(graph, engine.model):
                difference = np.abs(expected[output] - actual[output])
                if output in engine.model.state_names:
                    difference = difference * seen[..., None]  # padding is never read
                assert actual[output].dtype == np.float32
                assert difference.max() <= TOLERANCE[precision], (graph, output, batch, history, candidates)
    engine.close()


@pytest.mark.parametrize("name", [name for name, precision in ENGINES if precision == "f32"])
def test_answers_stay_the_callers_after_the_next_run(name: str, artefact: Artefact) -> None:
    engine = engines.create(name)
    engine.load(artefact)
    shape = Shape("rank", 2, 4, 8)
    first = engine.run("rank", inputs(engine, shape, 1))
    kept = first["scores"].copy()
    engine.run("rank", inputs(engine, shape, 2))
    assert np.array_equal(first["scores"], kept)


@pytest.mark.parametrize("name", [name for name, precision in ENGINES if precision == "f32"])
def test_an_impossible_input_is_an_engine_failure_and_the_engine_lives(name: str, artefact: Artefact) -> None:
    engine = engines.create(name)
    engine.load(artefact)
    good = inputs(engine, Shape("score", 2, 4, 8), 3)
    bad = {**good, "key_0": good["key_0"][:, :, :3].copy()}
    with pytest.raises(EngineFailed):
        engine.run("score", bad)
    assert np.isfinite(engine.run("score", good)["scores"]).all()


def test_a_name_or_precision_nobody_has_is_refused_with_what_there_is() -> None:
    with pytest.raises(ModelUnavailable, match="openvino"):
        engines.create("abacus")
    with pytest.raises(ModelUnavailable, match="CPUExecutionProvider"):
        engines.create("onnx", EngineOptions(provider="QuantumExecutionProvider"))
    with pytest.raises(ModelUnavailable, match="f32"):
        engines.create("numpy", EngineOptions(precision="bf16"))


@pytest.mark.parametrize("name", [status.name for status in USABLE])
def test_a_lower_precision_keeps_most_of_the_ten_best(
    name: str, artefact: Artefact, torch_engine: Engine
) -> None:
    status = next(status for status in USABLE if status.name == name)
    for precision in status.precisions:
        if precision not in engines.places(name).get("CPU" if name == "openvino" else "cpu", ()):
            continue
        engine = created(name, precision)
        engine.load(artefact, ("rank",))
        given = inputs(torch_engine, Shape("rank", 32, 50, 50), 7)
        best = [
            np.argsort(-some.run("rank", dict(given))["scores"], axis=1)[:, :10]
            for some in (torch_engine, engine)
        ]
        kept = np.mean([np.isin(theirs, ours).mean() for ours, theirs in zip(*best, strict=True)])
        assert kept >= (0.999 if precision == "f32" else 0.97), precision
        engine.close()


def test_auto_is_onnx_runtime_where_it_is_installed() -> None:
    pytest.importorskip("onnxruntime", reason="the first choice")
    assert engines.create("auto").name == "onnx"
