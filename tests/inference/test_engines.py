"""What engines can be asked for, what they refuse, and what int8 does to a graph."""

from __future__ import annotations

import importlib
import importlib.util
import json
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, numpy_helper

from compression.releases.registry import Artefact, Registry
from inference import engines
from inference.engines import quantise
from inference.engines.base import INPUTS, TOLERANCE, EngineOptions, Shape, outputs_of
from inference.engines.calibration import draw, samples
from inference.engines.quantise import INTEGER_TOLERANCE, activations_in_int8, weights_in_int8
from inference.errors import ModelUnavailable
from inference.types import Graph

GRAPHS: tuple[Graph, ...] = ("encode", "score")

# Names, places and precisions


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("torch", EngineOptions(device="cuda"), "GPU"),
        ("torch", EngineOptions(device="abacus"), "abacus"),
        ("torch", EngineOptions(precision="f16"), "f32 or bf16"),
        ("torch", EngineOptions(precision="int8"), "f32 or bf16 or f16"),
        ("onnx", EngineOptions(provider="cuda"), "was built without cuda"),
        ("onnx", EngineOptions(provider="rocm"), "was built without rocm"),
        ("onnx", EngineOptions(provider="quantum"), "knows no provider quantum"),
        ("onnx", EngineOptions(precision="f16"), "f32 on CPUExecutionProvider"),
        ("openvino", EngineOptions(device="NPU"), "NPU"),
        ("numpy", EngineOptions(precision="f16"), "f32"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_when_it_is_asked_for(
    name: str, options: EngineOptions, words: str
) -> None:
    if "cuda" in (options.device, options.provider) and list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("a GPU is here")
    with pytest.raises(ModelUnavailable, match=words):
        engines.create(name, options)


@pytest.mark.parametrize("provider", ["cpu", "CPU", "CPUExecutionProvider"])
def test_a_provider_goes_by_its_short_name(provider: str, artefact: Artefact) -> None:
    engine = engines.create("onnx", EngineOptions(provider=provider))
    engine.load(artefact, ("encode",))
    assert np.isfinite(engine.run("encode", engine.example(Shape("encode", 1, 4, 0)))["user_vector"]).all()


def test_openvinos_devices_go_by_either_case(artefact: Artefact) -> None:
    engine = engines.create("openvino", EngineOptions(device="cpu"))
    engine.load(artefact, ("encode",))
    assert np.isfinite(engine.run("encode", engine.example(Shape("encode", 1, 4, 0)))["user_vector"]).all()


def test_a_provider_that_cannot_start_is_no_silent_fallback(
    artefact: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime as ort

    claimed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: claimed)
    engine = engines.create("onnx", EngineOptions(provider="cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ModelUnavailable, match="could not start CUDAExecutionProvider"):
            engine.load(artefact)


def test_an_engine_is_unusable_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    missing = {"onnx", "tensorrt"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in missing else found(name, *rest)
    )
    why = {status.name: status.why for status in engines.usable()}
    assert why["onnx"] == why["numpy"] == "the Python package onnx is not installed"
    assert why["tensorrt"] == "the Python package tensorrt is not installed"
    with pytest.raises(ModelUnavailable, match="engine onnx: the Python package onnx"):
        engines.create("onnx")


def test_tensorrt_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_installed", lambda package: True)
    if not Path("/dev/nvidia0").exists():
        with pytest.raises(ModelUnavailable, match="no NVIDIA GPU is here"):
            engines.create("tensorrt")


def test_the_engines_listed_know_their_own_precisions() -> None:
    for status in engines.usable():
        if status.usable:
            assert engines.create(status.name).precisions == status.precisions
            assert "f32" in next(iter(engines.places(status.name).values()))


def test_tailrace_engines_prints_version_places_and_precisions() -> None:
    from infra.commands.engines import engines as command

    listed = {row["name"]: row for row in json.loads(CliRunner().invoke(command, ["--json"]).output)}
    assert listed["onnx"]["places"]["cpu"] == ["f32"]
    assert listed["onnx"]["version"]
    assert listed["tensorrt"]["usable"] or listed["tensorrt"]["why"]
    said = CliRunner().invoke(command, []).output
    assert "torch" in said
    assert "cpu: f32 bf16" in said


def test_the_bench_gives_every_engine_a_row_and_a_machine_without_a_gpu_rows_that_say_so(
    registry: Registry, tmp_path: Path
) -> None:
    from infra.bench.engines import engines as command

    told = ["--registry", str(registry.root), "--rounds", "1", "--seconds", "0.01", "--engine", "onnx"]
    ran = CliRunner().invoke(
        command, [*told, "--engine", "tensorrt", "--json", str(tmp_path / "figures.json")]
    )
    assert ran.exit_code == 0, ran.output
    rows = {
        (row["engine"], row["place"], row["precision"]): row
        for row in json.loads((tmp_path / "figures.json").read_text())["rows"]
    }
    measured = rows["onnx", "cpu", "f32"]
    assert measured["error"] <= TOLERANCE["f32"]
    assert measured["kept_of_ten"] == 10
    assert set(measured["lists_per_s"]) == {"1", "8", "32"}
    assert 10 < measured["memory_mib"] <= measured["peak_mib"]
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        assert rows["tensorrt", "cuda", "f16"]["not_measured"]
        assert "not measured" in ran.output


# torch on a GPU, without one


def test_torch_records_no_graph_on_a_cpu(artefact: Artefact) -> None:
    engine = engines.create("torch")
    engine.load(artefact)
    cost_s = engine.warm_up([Shape("encode", 2, 4, 0)], repeats=1)
    assert list(cost_s) == [Shape("encode", 2, 4, 0)]
    assert not engine._captured  # type: ignore[attr-defined]


def test_a_recorded_shape_is_replayed_with_the_callers_inputs_and_others_are_not(artefact: Artefact) -> None:
    import torch

    from inference.engines.torch_engine import TorchEngine, _Captured, _key

    engine = TorchEngine(EngineOptions())
    engine.load(artefact)
    shape = Shape("encode", 2, 4, 0)
    inputs = {name: torch.from_numpy(array) for name, array in engine.example(shape).items()}
    written = tuple(torch.zeros(2, 16) for _ in outputs_of("encode", engine.model))
    replays = []

    class Recording:
        def replay(self) -> None:
            replays.append(1)
            for output in written:
                output.fill_(float(inputs["items"].sum()))

    key = _key("encode", engine.example(shape))
    engine._captured[key] = _Captured(Recording(), inputs, written)
    given = engine.example(shape)
    given["items"][:] = 3
    first = engine.run("encode", given)["user_vector"].copy()
    assert (first == 24).all()
    engine.run("encode", engine.example(Shape("encode", 2, 10, 0)))
    assert len(replays) == 1


# int8


def test_int8_weights_keep_the_reaches_and_the_norms(
    artefact: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise, "SMALLEST", 1)
    before = onnx.load_model_from_string(artefact.read("encode.onnx"))
    after = onnx.load_model_from_string(weights_in_int8(artefact.read("encode.onnx")))
    onnx.checker.check_model(after, full_check=True)
    kinds = {tensor.name: (tensor.data_type, len(tensor.dims)) for tensor in after.graph.initializer}
    rounded = {name.removesuffix(".int8") for name in kinds if name.endswith(".int8")}
    assert "items.weight" in rounded
    assert any(name.startswith("constant_") for name in rounded)
    sizes = {tensor.name: len(tensor.dims) for tensor in before.graph.initializer}
    assert all(sizes[name] == 2 for name in rounded)
    kept = [t for t in after.graph.initializer if t.name in sizes and t.data_type == TensorProto.FLOAT]
    assert min(numpy_helper.to_array(tensor).min() for tensor in kept) == -1e9


def test_openvino_in_int8_answers_the_same_after_every_load(artefact: Artefact) -> None:
    answers = []
    for _ in range(2):
        engine = engines.create("openvino", EngineOptions(precision="int8"))
        engine.load(artefact, ("rank",))
        rng = np.random.default_rng(3)
        given = draw(artefact.vocabulary(), users=4, history=20, candidates=10, rng=rng)
        answers.append(engine.run("rank", given)["scores"])
    assert np.array_equal(*answers)


def test_drawn_histories_are_rows_the_model_has_and_equal_for_equal_seeds(artefact: Artefact) -> None:
    model = artefact.manifest.model
    drawn = [
        draw(artefact.vocabulary(), users=50, history=30, candidates=20, rng=np.random.default_rng(1))
        for _ in range(2)
    ]
    assert all(np.array_equal(drawn[0][name], drawn[1][name]) for name in INPUTS["rank"])
    assert set(drawn[0]) == set(INPUTS["rank"])
    for items, categories in (("items", "categories"), ("candidates", "candidate_categories")):
        assert drawn[0][items].max() < model.item_rows
        assert drawn[0][categories].max() < model.category_rows
    seen = np.arange(30) < drawn[0]["lengths"][:, None]
    assert ((drawn[0]["items"] > 0) == seen).all()


def test_the_int8_graphs_for_tensorrt_answer_within_their_tolerance(artefact: Artefact) -> None:
    """Their Q/DQ pairs, on ONNX Runtime: the arithmetic that TensorRT is told to do."""
    import onnxruntime as ort

    reference = engines.create("torch")
    reference.load(artefact)
    every: tuple[Graph, ...] = (*GRAPHS, "append")
    for graph in every:
        content = artefact.read(artefact.manifest.graphs[graph])
        lowered = activations_in_int8(content, samples(artefact, graph, batches=8))
        assert b"QuantizeLinear" in lowered
        session = ort.InferenceSession(lowered, providers=["CPUExecutionProvider"])
        for given in samples(artefact, graph, batches=4, seed=99):
            expected = reference.run(graph, dict(given))
            names = outputs_of(graph, reference.model)
            for name, array in zip(names, session.run(list(names), given), strict=True):
                if name in ("user_vector", "scores"):
                    assert np.abs(array - expected[name]).max() <= INTEGER_TOLERANCE
