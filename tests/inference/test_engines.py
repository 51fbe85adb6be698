"""What engines refuse, with which words, and what they keep between starts."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from compression.registry import Artefact, Registry
from inference import engines
from inference.engines.base import INPUTS, OUTPUTS, TOLERANCE, WEIGHTS, Engine, EngineOptions, Shape
from inference.engines.calibration import draw, samples
from inference.engines.model_file import check_graph
from inference.engines.plan_cache import PlanCache, PlanKey
from inference.engines.quantise import INTEGER_TOLERANCE, activations_in_int8, weights_in_int8
from inference.errors import EngineFailed, ModelUnavailable
from inference.types import Graph, Tensors
from tests.inference import fake_tensorrt

Change = Callable[[onnx.ModelProto], Any]


class Altered(Artefact):
    """The same version with the bytes of some files exchanged after their verification."""

    def __init__(self, artefact: Artefact, files: dict[str, bytes]) -> None:
        super().__init__(artefact.path, artefact.manifest, artefact.manifest_sha256)
        self._files = files

    def read(self, name: str) -> bytes:
        return self._files[name] if name in self._files else super().read(name)


def constant(model: onnx.ModelProto, dims: int) -> onnx.TensorProto:
    return next(
        tensor
        for tensor in model.graph.initializer
        if len(tensor.dims) == dims and tensor.data_type == TensorProto.FLOAT
    )


def poisoned(number: float, kind: int = TensorProto.FLOAT) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor = constant(model, 2)
        array = numpy_helper.to_array(tensor).copy()
        array[1, 1] = number
        made = helper.make_tensor(tensor.name, kind, array.shape, array.ravel().tolist())
        tensor.CopyFrom(made)

    return change


def external(model: onnx.ModelProto) -> None:
    tensor = constant(model, 2)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def shortened(model: onnx.ModelProto) -> None:
    tensor = constant(model, 2)
    tensor.raw_data = tensor.raw_data[:-4]


def enormous(model: onnx.ModelProto) -> None:
    constant(model, 2).dims[0] = 2**40


def custom(domain: str, kind: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import.add(domain=domain, version=1)
        model.graph.node.add(op_type=kind, domain=domain, input=["items"], output=["extra"])

    return change


def unknown(model: onnx.ModelProto) -> None:
    model.graph.node.add(op_type="Summon", input=["items"], output=["extra"])


def function(model: onnx.ModelProto) -> None:
    model.functions.append(
        helper.make_function(
            "ours",
            "Twice",
            ["x"],
            ["y"],
            [helper.make_node("Add", ["x", "x"], ["y"])],
            [helper.make_opsetid("", 18)],
        )
    )


def loop(model: onnx.ModelProto) -> None:
    body = helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "body", [], [])
    model.graph.node.append(helper.make_node("Loop", ["", ""], ["extra"], body=body))


def many(model: onnx.ModelProto) -> None:
    model.graph.node.extend(
        helper.make_node("Identity", ["items"], [f"copy_{place}"]) for place in range(20_001)
    )


def fill(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**40]), "far_too_long"))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["far_too_long"], ["extra"]))


def renamed(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == "gaps":
                node.input[place] = "pauses"
    next(value for value in model.graph.input if value.name == "gaps").name = "pauses"


def without_an_output(model: onnx.ModelProto) -> None:
    del model.graph.output[1:]


def wider(model: onnx.ModelProto) -> None:
    next(
        value for value in model.graph.input if value.name == "items"
    ).type.tensor_type.elem_type = TensorProto.INT64


def fixed(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8


def another_width(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 17


def dangling(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "nowhere"


BAD: dict[str, tuple[Change, str]] = {
    "NaN": (poisoned(float("nan")), "not finite"),
    "Inf in half precision": (poisoned(float("inf"), TensorProto.FLOAT16), "not finite"),
    "NaN in bfloat16": (poisoned(float("nan"), TensorProto.BFLOAT16), "not finite"),
    "external data": (external, "another file"),
    "a constant cut short": (shortened, "not what its type and shape say"),
    "a constant that claims to be enormous": (enormous, "not what its type and shape say"),
    "a domain of its own": (custom("ai.evil", "Shell"), "'ai.evil'"),
    "a com.microsoft operator": (custom("com.microsoft", "Inverse"), "'Inverse'"),
    "an operator ONNX does not have": (unknown, "'Summon'"),
    "a function": (function, "functions of its own"),
    "a loop": (loop, "graph of its own"),
    "too many operators": (many, "more than 20000"),
    "a constant that fills memory": (fill, "rows"),
    "an input of another name": (renamed, "pauses"),
    "a missing output": (without_an_output, "outputs are user_vector"),
    "an input of another type": (wider, "items is of type INT64, not INT32"),
    "a fixed batch": (fixed, r"\[8, 0\]"),
    "another width than the manifest's": (another_width, r"\[0, 17\]"),
    "an operator that reads nothing": (dangling, "nowhere"),
}


def altered(artefact: Artefact, graph: Graph, change: Change) -> bytes:
    model = onnx.load_model_from_string(artefact.read(artefact.manifest.graphs[graph]))
    change(model)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("what", BAD)
def test_a_model_file_is_refused_with_the_reason(what: str, artefact: Artefact) -> None:
    change, words = BAD[what]
    with pytest.raises(ModelUnavailable, match=words):
        check_graph(altered(artefact, "encode", change), "encode", artefact.manifest.model)


@pytest.mark.parametrize("kept", [0, 1, 20, 0.5, 0.999])
def test_a_truncated_model_file_is_refused(kept: float, artefact: Artefact) -> None:
    content = artefact.read("encode.onnx")
    size = int(kept * len(content)) if isinstance(kept, float) else kept
    with pytest.raises(ModelUnavailable, match="refused"):
        check_graph(content[:size], "encode", artefact.manifest.model)


def test_another_graph_than_its_name_says_is_refused(artefact: Artefact) -> None:
    with pytest.raises(ModelUnavailable, match="inputs are"):
        check_graph(artefact.read("score.onnx"), "encode", artefact.manifest.model)


def test_what_is_released_passes(artefact: Artefact) -> None:
    for graph, file in artefact.manifest.graphs.items():
        check_graph(artefact.read(file), graph, artefact.manifest.model)


@pytest.mark.parametrize("name", ["onnx", "openvino", "numpy"])
def test_no_engine_reads_a_file_before_it_is_checked(name: str, artefact: Artefact) -> None:
    engine = engines.create(name)
    changed = Altered(artefact, {"encode.onnx": altered(artefact, "encode", external)})
    with pytest.raises(ModelUnavailable, match="another file"):
        engine.load(changed)


def test_torch_refuses_weights_that_are_cut_short_or_not_finite(artefact: Artefact) -> None:
    from safetensors.torch import load, save

    content = artefact.read(WEIGHTS)
    weights = load(content)
    weights["readout.weight"][0, 0] = float("nan")
    for bad, words in ((content[:-8], "refused the weights"), (save(weights), "readout.weight")):
        with pytest.raises(ModelUnavailable, match=words):
            engines.create("torch").load(Altered(artefact, {WEIGHTS: bad}))


def test_a_file_that_was_altered_on_disk_is_refused_by_every_engine(artefact: Artefact) -> None:
    entry = {name: replace_sha(entry) for name, entry in artefact.manifest.files.items()}
    manifest = artefact.manifest.model_copy(update={"files": entry})
    changed = Artefact(artefact.path, manifest, artefact.manifest_sha256)
    for status in engines.usable():
        if status.usable:
            with pytest.raises(ModelUnavailable, match="not the file that was published"):
                engines.create(status.name).load(changed)


def replace_sha(entry: Any) -> Any:
    return entry.model_copy(update={"sha256": "0" * 64})


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
    written = tuple(torch.zeros(2, 16) for _ in OUTPUTS["encode"])
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


def test_int8_weights_keep_the_reaches_and_the_norms(artefact: Artefact) -> None:
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
    for graph in GRAPHS:
        content = artefact.read(artefact.manifest.graphs[graph])
        lowered = activations_in_int8(content, samples(artefact, graph, batches=8))
        assert b"QuantizeLinear" in lowered
        session = ort.InferenceSession(lowered, providers=["CPUExecutionProvider"])
        for given in samples(artefact, graph, batches=4, seed=99):
            expected = reference.run(graph, dict(given))
            actual = session.run(list(OUTPUTS[graph]), given)
            for name, array in zip(OUTPUTS[graph], actual, strict=True):
                if name in ("user_vector", "scores"):
                    assert np.abs(array - expected[name]).max() <= INTEGER_TOLERANCE


# TensorRT


KEY = PlanKey("a" * 64, "A GPU", "9.0", "10.16", "f16", {"items": ((1, 4), (8, 100))})


def test_a_plan_is_found_again_by_all_that_it_was_made_from(tmp_path: Path) -> None:
    PlanCache(tmp_path / "plans").put(KEY, b"a plan")
    cache = PlanCache(tmp_path / "plans")
    assert cache.get(KEY) == b"a plan"
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
            for name in OUTPUTS[graph]:
                assert np.array_equal(actual[name], expected[name])
    with pytest.raises(EngineFailed, match="not warmed"):
        engine.run("encode", engine.example(Shape("encode", 9, 4, 0)))
    engine.close()
    engine.close()


def _slots(given: Tensors) -> int:
    return given["keys"].shape[3] if "keys" in given else given["items"].shape[1]


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
