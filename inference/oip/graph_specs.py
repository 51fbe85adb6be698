"""The tensors of the exported graphs, as the protocol describes them."""

from __future__ import annotations

from compression.releases.registry import ModelShape
from features.encoding import BEHAVIOR_ROWS, GAP_ROWS
from inference.engines.base import inputs_of, outputs_of
from inference.oip.models import TensorSpec
from inference.types import Graph


def specs(graph: Graph, shape: ModelShape) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of an exported graph: names and types are the graph's, in its order."""
    tensors = {
        **{
            name: TensorSpec(name, "INT32", ("users", "slots"), 0, rows - 1)
            for name, rows in (
                ("items", shape.item_rows),
                ("categories", shape.category_rows),
                ("behaviors", BEHAVIOR_ROWS),
                ("gaps", GAP_ROWS),
            )
        },
        "lengths": TensorSpec("lengths", "INT32", ("users",), 0, "slots"),
        **{name: TensorSpec(name, "FP32", ("users", "slots", shape.dim)) for name in shape.state_names},
        "user_vector": TensorSpec("user_vector", "FP32", ("users", shape.dim)),
        "scores": TensorSpec("scores", "FP32", ("users", "candidates")),
        "candidates": TensorSpec("candidates", "INT32", ("users", "candidates"), 0, shape.item_rows - 1),
        "candidate_categories": TensorSpec(
            "candidate_categories", "INT32", ("users", "candidates"), 0, shape.category_rows - 1
        ),
    }
    inputs, outputs = inputs_of(graph, shape), outputs_of(graph, shape)
    return tuple(tensors[name] for name in inputs), tuple(tensors[name] for name in outputs)
