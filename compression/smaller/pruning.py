"""Closed-loop pruning: a dynamic threshold (formula 5) and masks (6) that hold while what is left is
trained (7). Whoever compresses takes it in rounds, with the threshold found anew in each.

Pruned weights are zeros in dense tensors: they cost no bytes once stored (`compression.smaller.packed`), but
just as much time. What is faster is `compression.smaller.structured`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Masks = Mapping[str, Tensor]


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


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Matrices and tables. Vectors (norms, biases, reach) are few, and each matters."""
    return {name: weight for name, weight in model.named_parameters() if weight.ndim >= 2}


def apply(model: nn.Module, masks: Masks) -> None:
    """W ⊙ M in place (formula 7), for every tensor that has a mask."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in masks:
                weight.mul_(masks[name])
