"""numpy, through ONNX's reference evaluator: slow, deterministic, the operators' definition itself.

For tests: it shares no kernel with any engine that serves, so where they agree both are right. It
reads the released graphs, and follows the network wherever that goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from compression.releases.registry import Artefact
from inference.engines.base import GRAPHS, Engine, EngineOptions, outputs_of
from inference.engines.model_file import read_graph
from inference.errors import EngineFailed, ModelUnavailable
from inference.types import Graph, Tensors


class GatherElements(OpRun):  # type: ignore[misc]
    """onnx 1.23's own gives up where the axis is longer than 64."""

    op_domain = ""

    def _run(self, data: Any, indices: Any, axis: int = 0) -> tuple[Any]:
        return (np.take_along_axis(data, indices, axis),)


class NumpyEngine(Engine):
    name = "numpy"

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._evaluators: dict[Graph, Any] = {}

    def load(self, artefact: Artefact, graphs: Sequence[Graph] = GRAPHS) -> None:
        self.model = artefact.manifest.model
        for graph in graphs:
            content = read_graph(artefact, graph)
            try:
                model = onnx.load_model_from_string(content)
                self._evaluators[graph] = ReferenceEvaluator(model, new_ops=[GatherElements])
            except (ValueError, RuntimeError) as error:
                raise ModelUnavailable(f"numpy cannot read the {graph} graph: {error}") from error

    def run(self, graph: Graph, inputs: Tensors) -> Tensors:
        names = outputs_of(graph, self.model)
        try:
            outputs = self._evaluators[graph].run(list(names), inputs)
        except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
            raise EngineFailed(f"numpy: {graph}: {error!r}") from error
        return {name: np.ascontiguousarray(output) for name, output in zip(names, outputs, strict=True)}

    def close(self) -> None:
        self._evaluators.clear()
