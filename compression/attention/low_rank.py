"""Low-rank heads: each head's projection is the product of two of rank r (III.A, 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compression.attention.full import FullAttention


class LowRankLinear(nn.Module):
    """[..., d] to [..., d]: per head d to r to d/H, and one bias."""

    def __init__(self, dim: int, heads: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, heads * rank, bias=False)
        self.up = nn.Parameter(torch.empty(heads, rank, dim // heads))
        self.bias = nn.Parameter(torch.zeros(dim))
        # The product's entries vary as much as a plain projection's, 0.02.
        nn.init.normal_(self.down.weight, std=0.02**0.5)
        nn.init.normal_(self.up, std=0.02**0.5 * rank**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        heads, rank, width = self.up.shape
        narrow = self.down(x).reshape(-1, heads, rank).transpose(0, 1)
        wide = torch.bmm(narrow, self.up).transpose(0, 1)
        return wide.reshape(*x.shape[:-1], heads * width) + self.bias

    def matrix(self) -> Tensor:
        """[d, d] as `nn.Linear` has it: out by in."""
        heads, rank, _ = self.up.shape
        down = self.down.weight.view(heads, rank, -1)
        return torch.einsum("hri,hro->hoi", down, self.up).reshape(-1, down.shape[-1])


class LowRankAttention(FullAttention):
    """Full attention with query, key and value of rank r per head; r is far below d/H to be worth it."""

    def __init__(self, dim: int, heads: int = 1, dropout: float = 0.0, *, rank: int = 8) -> None:
        super().__init__(dim, heads, dropout)
        if not 1 <= rank <= dim // heads:
            raise ValueError(f"a rank lies between 1 and the {dim // heads} dimensions of a head, not {rank}")
        self.query, self.key, self.value = (LowRankLinear(dim, heads, rank) for _ in range(3))  # type: ignore[assignment]


def parameters(dim: int, heads: int, rank: int) -> int:
    """3 (d H r + r d + d) + d² + d."""
    return 3 * (dim * heads * rank + rank * dim + dim) + dim * dim + dim


def flops(dim: int, heads: int, rank: int, length: int) -> int:
    """Two per product: 2 L (3 (d H r + r d) + d²) for the maps, 4 L² d for logits and sums."""
    maps = 3 * (dim * heads * rank + rank * dim) + dim * dim
    return 2 * length * maps + 4 * length * length * dim
