"""A trained `Recommender` made smaller, stage by stage: distilled, pruned in rounds, its tables rounded.

A stage is a training like any other: where it begins, and a lesson beside its losses. The whole network is
the teacher of every stage. Networks have one head, so what is pruned is feed-forward channels: the threshold
(formula 5) is on how much a channel can write, what lies below leaves for good (6), and each round ends in
fine-tuning (7). Zeros among weights that stay would make no file and no answer of the service smaller or
faster: its graphs are dense.
"""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from compression.releases.registry import ModelShape
from compression.smaller.distil import layer_mapping, maps_divergence, opinion_divergence
from compression.smaller.plan import Compression
from compression.smaller.pruning import mask, threshold
from compression.smaller.quantization import aware
from compression.training.lesson import Asked, Lesson
from compression.training.model import Block, Recommender
from compression.training.train import Recipe
from compression.training.weights import TABLE_GRID, TABLES
from features.encoding import Vocabulary

Weights = dict[str, Tensor]
_FINE: Final = 0.5  # of the recipe's learning rate, where a network is trained already
_ASKED_ITEMS: Final = 512  # of the catalogue, that a teacher is asked about per batch
_ASKED_STATES: Final = 256  # events of a batch after which it is asked


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """What `train` is given: a recipe of the network's new sizes, the weights it begins with, a lesson."""

    recipe: Recipe
    weights: Weights
    lesson: Lesson


def stage(
    name: str, recipe: Recipe, vocabulary: Vocabulary, teacher: Recommender, before: Recommender
) -> Stage:
    """The stage of that name (`Compression.stages`) of the recipe; `before` is what the stage before made,
    `teacher` the network as it was trained."""
    plan, sizes = recipe.compression, before.shape
    unpruned = max(1, round(recipe.ffn * plan.student_ffn)) if plan.distil else recipe.ffn
    recipe = replace(recipe, dim=sizes.dim, layers=sizes.layers, ffn=sizes.ffn, compression=Compression())
    if name == "distil":
        small = replace(
            recipe,
            dim=max(2, round(recipe.dim * plan.student_dim)),
            layers=max(1, round(recipe.layers * plan.student_layers)),
            ffn=max(1, round(recipe.ffn * plan.student_ffn)),
        )
        begun = student(before, small.shape(vocabulary))
        return Stage(_part(small, plan.student_share), begun, Taught(teacher, plan))
    fine = replace(recipe, learning_rate=_FINE * recipe.learning_rate)
    if name == "quantize":
        lesson = Rounded(teacher, plan)
        return Stage(_part(fine, plan.aware_share), _copy(before), lesson)
    number = int(name.removeprefix("prune-"))
    kept = pruned_channels(unpruned, plan, number)
    weights = keep_channels(_copy(before), kept)
    return Stage(_part(replace(fine, ffn=kept), plan.round_share), weights, Taught(teacher, plan))


def _part(recipe: Recipe, share: float) -> Recipe:
    """A part of a recipe's training, at least an epoch; none of it where the share is 0."""
    epochs = max(1, round(recipe.epochs * share)) if share else 0
    return replace(recipe, epochs=epochs, max_minutes=recipe.max_minutes * max(share, 1e-6))


# Students ------------------------------------------------------------------------------------------


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
    whole = _copy(teacher)
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


# Pruning -------------------------------------------------------------------------------------------


def pruned_channels(ffn: int, plan: Compression, number: int) -> int:
    """How many of `ffn` channels are left after the round; rounds remove equal shares of them."""
    return max(1, round(ffn * (1 - (1 - plan.kept_channels) * number / plan.rounds)))


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


# Lessons -------------------------------------------------------------------------------------------


class Taught(Lesson):
    """A teacher says what it thinks of the candidates and of some of the catalogue, and where it looks."""

    def __init__(self, teacher: Recommender, plan: Compression) -> None:
        self._teacher, self._plan = teacher.eval(), plan

    def loss(self, model: Recommender, asked: Asked, user_vectors: Tensor, scores: Tensor) -> Tensor:
        plan, teacher = self._plan, self._teacher
        own_maps = _taken(model) if plan.maps else ([], [])
        with torch.no_grad():
            vectors = teacher.item_vectors(asked.rows, asked.categories)
            their_vectors, states = teacher(asked.history, vectors, asked.seen)
            count = asked.rows.shape[1] // asked.turn.shape[1]
            at = asked.turn[..., None].expand(-1, -1, their_vectors.shape[-1])
            asking = their_vectors.gather(1, at).repeat_interleave(count, dim=1)
            their_scores = teacher.readout_scores(states, vectors, asking)
            their_maps = _taken(teacher) if plan.maps else ([], [])
        said = opinion_divergence(scores.view(-1, count), their_scores.view(-1, count))
        events = asked.inside.nonzero()
        events = events[torch.randperm(len(events))[:_ASKED_STATES]]
        rows = 1 + torch.randint(asked.known, (_ASKED_ITEMS,))
        of_rows = asked.row_categories[rows]
        ours = user_vectors[events[:, 0], events[:, 1]] @ model.item_vectors(rows, of_rows).T
        with torch.no_grad():
            theirs = their_vectors[events[:, 0], events[:, 1]] @ teacher.item_vectors(rows, of_rows).T
        said = said + opinion_divergence(ours, theirs)
        if not plan.maps:
            return plan.opinions * said
        asking = (asked.inside.float(), torch.ones(asked.rows.shape))
        looked = [maps_divergence(*maps) for maps in zip(own_maps, their_maps, asking, strict=True)]
        return plan.opinions * said + plan.maps * (looked[0] + looked[1])

    def begin(self, model: Recommender) -> None:
        for block in (*_blocks(model), *_blocks(self._teacher)):
            # A layer is asked for events, then for candidates.
            block.maps = deque(maxlen=2) if self._plan.maps else None

    def end(self, model: Recommender) -> None:
        for block in (*_blocks(model), *_blocks(self._teacher)):
            block.maps = None


class Rounded(Taught):
    """The same, with the tables rounded wherever they are read; in the end they stay so."""

    def begin(self, model: Recommender) -> None:
        super().begin(model)
        self._open = ExitStack()
        self._open.enter_context(aware(model, dict.fromkeys(TABLES, TABLE_GRID)))

    def end(self, model: Recommender) -> None:
        self._open.close()
        super().end(model)


def _taken(network: Recommender) -> tuple[list[Tensor], list[Tensor]]:
    """Maps [B, 1, T, S] by layer of the latest forward pass: of events, and of candidates."""
    found = []
    for block in _blocks(network):
        assert block.maps is not None
        found.append([one[:, None] for one in block.maps])
    return [events for events, _ in found], [candidates for _, candidates in found]


def _blocks(network: Recommender) -> list[Block]:
    return [block for block in network.blocks if isinstance(block, Block)]


def _copy(network: Recommender) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


# Figures -------------------------------------------------------------------------------------------


def figures(network: Recommender) -> dict[str, Any]:
    """What a network is, apart from its files and from clocks."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    shape = network.shape.model_dump()
    return {"shape": shape, "parameters": parameters, "mflop": round(list_flops(network.shape) / 1e6, 4)}


def list_flops(shape: ModelShape, candidates: int = 50) -> int:
    """Floating-point operations of the matrix products of a list: a full history encoded once, and the
    candidates scored. A multiplication and an addition are two."""
    dim, length = shape.dim, shape.max_history
    feed = 4 * dim * shape.ffn
    keys_values = 4 * dim * dim * length
    per_event = 4 * dim * length + feed
    per_candidate = 4 * dim * (length + 1) + feed
    events = shape.layers * keys_values + (shape.layers - 1) * length * per_event + per_event
    return events + candidates * (shape.layers * per_candidate + 4 * dim)
