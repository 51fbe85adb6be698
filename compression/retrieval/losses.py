"""Softmax over the catalogue, whole while it is small, over negatives shared by the batch beyond."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from compression.attention.base import HIDDEN

Int64 = npt.NDArray[np.int64]

_ROWS: Final = 512
"""States at a time: their logits over some thousand items stay in the cache, which is worth 2.6 times."""


# Of some rows and their logits [n, V], which it may change: the summed loss, and its gradient by the logits.
Part = Callable[[slice, Tensor], tuple[Tensor, Tensor]]


def in_parts(states: Tensor, table: Tensor, part: Part, *, low: torch.dtype) -> Tensor:
    """Mean loss by the logits states [N, d] · table [V, d], which are never all held: they are made, and
    their gradients with them, some rows at a time, products in `low`."""
    loss: Tensor = _InParts.apply(states, table, part, low)  # type: ignore[no-untyped-call]
    return loss


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Tensor, part: Part, low: torch.dtype) -> Tensor:
        items = table.to(low)
        across = items.T.contiguous()
        of_states = torch.empty(states.shape)
        of_table = torch.zeros(table.shape)
        loss = torch.zeros(())
        for start in range(0, len(states), _ROWS):
            rows = slice(start, start + _ROWS)
            some = states[rows].to(low)
            its_loss, error = part(rows, (some @ across).float())
            loss += its_loss
            error = error.to(low)
            of_states[rows] = error @ items
            of_table += error.T @ some
        count = max(1, len(states))
        ctx.save_for_backward(of_states.div_(count), of_table.div_(count))
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_states, of_table = ctx.saved_tensors
        return of_states * outer[0], of_table * outer[0], None, None


def full_softmax(states: Tensor, table: Tensor, targets: Tensor, *, low: torch.dtype) -> Tensor:
    """Mean cross-entropy of targets [N] by the logits states [N, d] · table [V, d]."""

    def part(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        own = targets[rows, None]
        normal = logits.logsumexp(1, keepdim=True)
        loss = (normal - logits.gather(1, own)).sum()
        chances = logits.sub_(normal).exp_()
        return loss, chances.scatter_add_(1, own, torch.full(own.shape, -1.0))

    return in_parts(states, table, part, low=low)


def shared_negatives(
    states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor, log_expected: Tensor
) -> Tensor:
    """Mean cross-entropy of targets [N] against the same `negatives` [S] for all, with the logQ
    correction: `log_expected` [V] is how often, as a logarithm, an item is drawn."""
    own = (states * table[targets]).sum(-1, keepdim=True) - log_expected[targets, None]
    others = states @ table[negatives].T - log_expected[negatives]
    others = others.float().masked_fill(targets[:, None] == negatives, HIDDEN)
    return F.cross_entropy(torch.cat([own, others], 1), torch.zeros_like(targets))


class Negatives:
    """Draws of items, half by how often they occur to the power 0.75, half evenly."""

    def __init__(self, counts: Int64, size: int) -> None:
        """`counts` [V]: how often each item occurs in training."""
        popular = np.maximum(counts, 0) ** 0.75
        popular = popular / max(1.0, popular.sum())
        self._size = size
        self._cumulated = np.cumsum(popular)
        chance = 0.5 * popular + 0.5 / len(counts)
        self.log_expected = torch.from_numpy(np.log(chance * size)).float()

    def draw(self, rng: np.random.Generator) -> Tensor:
        """[size] places in the table, those drawn twice counted twice."""
        half = self._size // 2
        often = np.searchsorted(self._cumulated, rng.random(half) * self._cumulated[-1])
        evenly = rng.integers(0, len(self._cumulated), self._size - half)
        drawn = np.concatenate([np.minimum(often, len(self._cumulated) - 1), evenly])
        return torch.from_numpy(drawn.astype(np.int64))
