"""Grouped linear projections: d split into k groups with a projection each (III.A, 1)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from compression.attention.full import FullAttention


class GroupedLinear(nn.Module):
    """[..., d] to [..., d], group by group: k maps of d/k to d/k, which together are one bias and a
    block-diagonal matrix."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        if dim % groups:
            raise ValueError(f"{groups} groups do not divide {dim} dimensions")
        self.weight = nn.Parameter(0.02 * torch.randn(groups, dim // groups, dim // groups))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        groups, width, _ = self.weight.shape
        apart = x.reshape(-1, groups, width).transpose(0, 1)
        return torch.bmm(apart, self.weight).transpose(0, 1).reshape(x.shape) + self.bias

    def matrix(self) -> Tensor:
        """[d, d] as `nn.Linear` has it: out by in."""
        return cast(Tensor, torch.block_diag(*self.weight.transpose(1, 2)))  # type: ignore[no-untyped-call]


class GroupedAttention(FullAttention):
    """Full attention whose query, key and value are grouped projections. The one that leaves stays whole:
    it is where groups meet."""

    def __init__(self, dim: int, heads: int = 1, dropout: float = 0.0, *, groups: int = 4) -> None:
        super().__init__(dim, heads, dropout)
        self.query, self.key, self.value = (GroupedLinear(dim, groups) for _ in range(3))  # type: ignore[assignment]


def parameters(dim: int, groups: int) -> int:
    """3 (d²/k + d) + d² + d."""
    return 3 * (dim * dim // groups + dim) + dim * dim + dim


def flops(dim: int, groups: int, length: int) -> int:
    """Two per product: 2 L (3 d²/k + d²) for the maps, 4 L² d for logits and sums."""
    return 2 * length * (3 * dim * dim // groups + dim * dim) + 4 * length * length * dim
