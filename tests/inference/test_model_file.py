"""A model file that is not what it should be is refused before an engine reads it, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compression.releases.registry import Artefact
from inference import engines
from inference.engines.base import WEIGHTS
from inference.engines.model_file import check_graph
from inference.errors import ModelUnavailable
from inference.types import Graph

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


def test_a_version_from_when_keys_and_values_were_put_together_is_to_be_published_anew(
    artefact: Artefact,
) -> None:
    model = onnx.load_model_from_string(artefact.read("score.onnx"))
    for value, name in zip(model.graph.input, ("keys", "values"), strict=False):
        value.name = name
    with pytest.raises(ModelUnavailable, match="publish it anew"):
        check_graph(model.SerializeToString(), "score", artefact.manifest.model)


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
