"""A small trained model as OpenVINO IR, as ONNX for TensorRT and as a LiteRT model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto

from compression.releases.registry import Artefact, Registry
from inference.engines.base import TOLERANCE
from inference.engines.openvino_core import core
from inference.engines.quantise import INTEGER_TOLERANCE
from infra.commands.export import export as command
from infra.export import litert, openvino_ir
from infra.export.folder import MANIFEST, ExportFailed, ExportManifest, entries
from infra.export.parity import rank_inputs, reference


def exported(registry: Path, out: Path, *words: str) -> ExportManifest:
    """What the command says; the files are those that the manifest promises."""
    answer = CliRunner().invoke(
        command, [*words, "--registry", str(registry), "--out", str(out), "--json"], catch_exceptions=False
    )
    assert answer.exit_code == 0, answer.output
    manifest = ExportManifest.model_validate_json((out / MANIFEST).read_bytes())
    assert entries({name: (out / name).read_bytes() for name in manifest.files}) == manifest.files
    said = json.loads(answer.stdout)
    assert said["bytes"] == sum(entry.bytes for entry in manifest.files.values())
    assert said["version"] == manifest.version
    return manifest


@pytest.fixture(scope="module")
def artefact(registry: Path) -> Artefact:
    return Registry(registry).open()


@pytest.fixture(scope="module")
def asked(artefact: Artefact) -> list[dict[str, Any]]:
    return list(rank_inputs(artefact.vocabulary(), artefact.manifest.model.max_history, seed=77))


@pytest.mark.parametrize("numbers", openvino_ir.WEIGHTS)
def test_openvino_reads_what_was_written_and_answers_alike(
    numbers: Any, registry: Path, artefact: Artefact, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    manifest = exported(registry, tmp_path / "ir", "openvino", "--numbers", numbers)
    assert manifest.graphs.keys() == artefact.manifest.graphs.keys()
    tolerance = TOLERANCE[numbers]
    assert all(graph.max_difference <= tolerance for graph in manifest.graphs.values())
    model = core().compile_model(tmp_path / "ir" / "rank.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    published = reference(artefact.read("rank.onnx"))
    for inputs in asked:
        scores = model(inputs)["scores"]
        np.testing.assert_allclose(scores, published(inputs)["scores"], atol=tolerance)


def test_narrower_weights_are_smaller_files(registry: Path, tmp_path: Path) -> None:
    sizes = [
        exported(registry, tmp_path / numbers, "openvino", "--numbers", numbers).files["rank.bin"].bytes
        for numbers in openvino_ir.WEIGHTS
    ]
    assert sizes[0] > 1.8 * sizes[1]
    assert sizes[1] > sizes[2]


@pytest.mark.parametrize(("numbers", "tolerance"), [("f16", TOLERANCE["f16"]), ("int8", INTEGER_TOLERANCE)])
def test_tensorrt_is_given_types_ranges_and_a_command(
    numbers: str, tolerance: float, registry: Path, artefact: Artefact, tmp_path: Path
) -> None:
    manifest = exported(registry, tmp_path / "trt", "tensorrt", "--numbers", numbers)
    assert manifest.graphs.keys() == artefact.manifest.graphs.keys()
    assert all(0 < graph.max_difference <= tolerance for graph in manifest.graphs.values())
    longest = artefact.manifest.model.max_history
    build = manifest.graphs["rank"].build.split()
    assert build[0] == "trtexec"
    assert f"--maxShapes=items:32x{longest}," in manifest.graphs["rank"].build
    assert "--minShapes=items:1x4," in manifest.graphs["rank"].build
    model = onnx.load(tmp_path / "trt" / "rank.onnx")
    onnx.checker.check_model(model, full_check=True)
    kinds = {node.op_type for node in model.graph.node}
    weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    if numbers == "f16":
        assert weights["items.weight"] == TensorProto.FLOAT16
        wide = {node.output[0] for node in model.graph.node if node.op_type == "Cast"}
        softmaxes = [node for node in model.graph.node if node.op_type == "Softmax"]
        assert softmaxes
        assert all(node.input[0] in wide for node in softmaxes)
    else:
        assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert all(value.type.tensor_type.elem_type == TensorProto.FLOAT for value in model.graph.output)


@pytest.mark.timeout(900)
def test_litert_answers_alike(registry: Path, artefact: Artefact, tmp_path: Path) -> None:
    if not litert.venv_dir().is_dir() and not os.environ.get("CI"):
        pytest.skip("no LiteRT converter here: `tailrace export litert` installs one (1 GB)")
    manifest = exported(registry, tmp_path / "phone", "litert")
    assert manifest.graphs["rank"].max_difference <= TOLERANCE["f32"]
    content = (tmp_path / "phone" / litert.FILE).read_bytes()
    assert content[4:8] == b"TFL3"


def test_a_converter_that_fails_is_a_sentence(
    artefact: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = litert.venv_dir().relative_to(litert.home())
    monkeypatch.setenv("TAILRACE_HOME", str(tmp_path))
    failing = tmp_path / python / "bin" / "python"
    failing.parent.mkdir(parents=True)
    failing.write_text("#!/bin/sh\necho no converter >&2\nexit 3\n")
    failing.chmod(0o755)
    with pytest.raises(ExportFailed, match="LiteRT cannot convert this:\nno converter"):
        litert.export(artefact, tmp_path / "phone")
    assert not (tmp_path / "phone").exists()


def test_answers_that_differ_too_much_are_not_written(
    artefact: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOLERANCE, "int8", 1e-9)
    with pytest.raises(ExportFailed, match="graph in int8 differs by"):
        openvino_ir.export(artefact, tmp_path / "ir", numbers="int8")
    assert not (tmp_path / "ir").exists()
