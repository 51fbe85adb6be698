"""A trained `Recommender` made smaller, stage by stage: distilled, pruned in rounds, its tables rounded.

A stage is a training like any other: where it begins, and a lesson beside its losses. The whole network is
the teacher of every stage. Networks have one head, so what is pruned is feed-forward channels: the threshold
(formula 5) is on how much a channel can write, what lies below leaves for good (6), and each round ends in
fine-tuning (7). Zeros among weights that stay would make no file and no answer of the service smaller or
faster: its graphs are dense.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from compression.releases.registry import ModelShape
from compression.smaller.lessons import Rounded, Taught
from compression.smaller.plan import Compression
from compression.smaller.student import Weights, keep_channels, student, weights_of
from compression.training.lesson import Lesson
from compression.training.model import Recommender
from compression.training.train import Recipe
from features.encoding import Vocabulary

_FINE: Final = 0.5  # of the recipe's learning rate, where a network is trained already


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
        return Stage(_part(fine, plan.aware_share), weights_of(before), lesson)
    number = int(name.removeprefix("prune-"))
    kept = pruned_channels(unpruned, plan, number)
    weights = keep_channels(weights_of(before), kept)
    return Stage(_part(replace(fine, ffn=kept), plan.round_share), weights, Taught(teacher, plan))


def _part(recipe: Recipe, share: float) -> Recipe:
    """A part of a recipe's training, at least an epoch; none of it where the share is 0."""
    epochs = max(1, round(recipe.epochs * share)) if share else 0
    return replace(recipe, epochs=epochs, max_minutes=recipe.max_minutes * max(share, 1e-6))


def pruned_channels(ffn: int, plan: Compression, number: int) -> int:
    """How many of `ffn` channels are left after the round; rounds remove equal shares of them."""
    return max(1, round(ffn * (1 - (1 - plan.kept_channels) * number / plan.rounds)))


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
