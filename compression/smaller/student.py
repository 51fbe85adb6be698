"""Where a smaller network begins: a trained one in fewer directions, layers and channels."""

from __future__ import annotations

import torch
from torch import Tensor

from compression.releases.registry import ModelShape
from compression.smaller.distil import layer_mapping
from compression.smaller.pruning import mask, threshold
from compression.training.model import Recommender

Weights = dict[str, Tensor]


@torch.no_grad()
def student(teacher: Recommender, shape: ModelShape) -> Weights:
    """Where a smaller network begins: the teacher's layers that it is matched with, seen in the directions
    in which the teacher's items differ most, and of the feed-forward part what writes most.

    Turned into other directions, a norm's weights no longer belong to one number each: they become part of
    the matrices behind the norm. With fewer numbers of about the same length a vector divided by its root
    mean square is shorter; the norm's weight makes up for that."""
    wide, narrow = teacher.shape, shape
    if narrow.dim > wide.dim or narrow.ffn > wide.ffn:
        raise ValueError(f"a student of {narrow.dim} × {narrow.ffn} is wider than its teacher")
    whole = weights_of(teacher)
    turn = _directions(teacher, narrow.dim)
    longer = (wide.dim / narrow.dim) ** 0.5
    made: Weights = {}
    for name in ("items", "categories", "behaviors", "gaps"):
        made[f"{name}.weight"] = whole[f"{name}.weight"] @ turn.T
    if narrow.dim == wide.dim:
        made["final_norm.weight"], readout = whole["final_norm.weight"], whole["readout.weight"]
    else:
        final = whole["final_norm.weight"]
        made["final_norm.weight"] = torch.full((narrow.dim,), float(final.mean()) * longer)
        readout = whole["readout.weight"] * final / final.mean()
    made["readout.weight"] = readout @ turn.T
    made["no_history"] = turn @ whole["no_history"]
    for name in ("affinity_scale", "found_scale"):
        made[name] = whole[name]
    for number, other in enumerate(layer_mapping(narrow.layers, wide.layers)):
        block = {
            name.removeprefix(f"blocks.{other}."): tensor
            for name, tensor in whole.items()
            if name.startswith(f"blocks.{other}.")
        }
        if narrow.dim < wide.dim:
            block = _turned(block, turn, longer)
        made |= {f"blocks.{number}.{name}": tensor for name, tensor in block.items()}
    return keep_channels(made, narrow.ffn) if narrow.ffn < wide.ffn else made


def _directions(teacher: Recommender, dim: int) -> Tensor:
    """[dim, wide]: orthonormal; the identity where nothing gets narrower."""
    if dim == teacher.shape.dim:
        return torch.eye(dim)
    table = torch.cat([teacher.items.weight, teacher.categories.weight])
    _, _, directions = torch.linalg.svd(table.T @ table)
    return torch.as_tensor(directions[:dim])


def _turned(block: Weights, turn: Tensor, longer: float) -> Weights:
    asks, feeds = block["attention_norm.weight"], block["ffn_norm.weight"]
    made = {name: block[name] for name in ("event_reach", "candidate_reach", "nothing_reach")}
    for name in ("attention_norm.weight", "ffn_norm.weight"):
        made[name] = torch.full((len(turn),), longer)
    # Products of queries and keys are divided by the root of their width, and that is less now.
    made["key.weight"] = turn @ (asks[:, None] * block["key.weight"] * asks) @ turn.T / longer
    made["value.weight"] = turn @ (block["value.weight"] * asks) @ turn.T
    made["nothing_key"] = turn @ (asks * block["nothing_key"])
    made["nothing_value"] = turn @ block["nothing_value"]
    made["widen.weight"] = block["widen.weight"] * feeds @ turn.T
    made["narrow.weight"] = turn @ block["narrow.weight"]
    return made


@torch.no_grad()
def keep_channels(weights: Weights, kept: int) -> Weights:
    """The weights with `kept` feed-forward channels a layer: norm of what enters a channel times norm of
    what it writes says which."""
    made = dict(weights)
    for name, widen in weights.items():
        if not name.endswith("widen.weight"):
            continue
        narrow = name.replace("widen", "narrow")
        importance = torch.linalg.vector_norm(widen, dim=1) * torch.linalg.vector_norm(weights[narrow], dim=0)
        theta = threshold(importance, 1 - kept / len(importance))
        # Of several that are as important as the last one, the first ones stay.
        stay = mask(importance, theta).nonzero().flatten()[:kept]
        made[name], made[narrow] = widen[stay].clone(), weights[narrow][:, stay].clone()
    return made


def weights_of(network: Recommender) -> Weights:
    """A copy that training leaves alone."""
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
