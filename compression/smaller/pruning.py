"""Closed-loop pruning: a dynamic threshold (formula 5), masks (6), and K rounds that each end in
fine-tuning (7).

Pruned weights are zeros in dense tensors: they cost no bytes once stored (`compression.smaller.packed`), but
just as much time. What is faster is `compression.smaller.structured`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Masks = Mapping[str, Tensor]
FineTune = Callable[[nn.Module, Callable[[], None]], None]
"""Trains a model for a while, and calls the function it is given after every step."""


@dataclass(frozen=True, slots=True)
class Round:
    """What one round left: the share of all parameters that are zero, and thresholds by tensor."""

    number: int
    zeros: float
    thresholds: dict[str, float]


def threshold(weights: Tensor, share: float) -> float:
    """θ such that a share p of all |w| lies below it (formula 5): the share is exact up to ties."""
    if not 0.0 <= share < 1.0:
        raise ValueError(f"a share to prune lies in [0, 1), not {share}")
    below = round(share * weights.numel())
    if below == 0:
        return 0.0
    # The smallest of those that stay; |w| < θ are those that go.
    return float(weights.detach().abs().flatten().kthvalue(below + 1).values)


def mask(weights: Tensor, theta: float) -> Tensor:
    """M = [|w| >= θ] (formula 6), as booleans of the tensor's shape."""
    return weights.detach().abs() >= theta


def zeros(model: nn.Module) -> float:
    """The share of all parameters that are zero, item table, biases and norms included."""
    parameters = list(model.parameters())
    empty = sum(int((parameter == 0).sum()) for parameter in parameters)
    return empty / sum(parameter.numel() for parameter in parameters)


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Matrices and tables. Vectors (norms, biases, reach) are few, and each matters."""
    return {name: weight for name, weight in model.named_parameters() if weight.ndim >= 2}


def apply(model: nn.Module, masks: Masks) -> None:
    """W ⊙ M in place (formula 7), for every tensor that has a mask."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in masks:
                weight.mul_(masks[name])


def prune(
    model: nn.Module,
    fine_tune: FineTune,
    *,
    share: float = 0.4,
    rounds: int = 3,
    after: Callable[[Round], None] | None = None,
) -> dict[str, Tensor]:
    """Make a share of all parameters zero in K rounds, equal steps; each is followed by fine-tuning, in
    which what is pruned stays zero. The threshold is found anew per tensor and round, from what training
    made of the weights. The last round's masks."""
    if rounds < 1:
        raise ValueError("pruning takes at least one round")
    masks: dict[str, Tensor] = {}
    matrices = prunable(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    # Vectors are kept whole, so matrices give a little more than the share.
    of_matrices = share * total / sum(weight.numel() for weight in matrices.values())
    for number in range(1, rounds + 1):
        thresholds = {
            name: threshold(weight, of_matrices * number / rounds) for name, weight in matrices.items()
        }
        masks = {name: mask(weight, thresholds[name]) for name, weight in matrices.items()}
        apply(model, masks)
        fine_tune(model, lambda kept=masks: apply(model, kept))  # type: ignore[misc]
        if after is not None:
            after(Round(number, zeros(model), thresholds))
    return masks
