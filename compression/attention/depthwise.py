"""Depthwise-separable mapping: a convolution per channel along the sequence, then a pointwise projection
(III.A, 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compression.attention.full import FullAttention


class DepthwiseSeparable(nn.Module):
    """x [B, L, d] to [B, L, d]; an event is mapped together with the `kernel` - 1 before it, or, where
    attention is not causal, with those around it."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.pointwise = nn.Linear(dim, dim)
        # Starts as the pointwise projection of the event itself, which a causal kernel has last.
        nn.init.normal_(self.depthwise.weight, std=0.02)
        nn.init.normal_(self.pointwise.weight, std=0.02)
        with torch.no_grad():
            self.depthwise.weight[:, :, -1] += 1.0
        for bias in (self.depthwise.bias, self.pointwise.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, causal: bool = True) -> Tensor:
        reach = self.depthwise.kernel_size[0] - 1
        before = reach if causal else reach // 2
        along = F.pad(x.transpose(1, 2), (before, reach - before))
        mapped: Tensor = self.pointwise(self.depthwise(along).transpose(1, 2))
        return mapped


class DepthwiseAttention(FullAttention):
    """Full attention whose query, key and value are depthwise-separable maps.

    A full convolution of the same kernel c would have c d² weights each; this has c d + d². Beside a plain
    projection, which looks at one event alone, it is c d more, not less."""

    def __init__(self, dim: int, heads: int = 1, dropout: float = 0.0, *, kernel: int = 3) -> None:
        super().__init__(dim, heads, dropout)
        if kernel < 1:
            raise ValueError(f"a kernel covers at least one event, not {kernel}")
        self.query, self.key, self.value = (DepthwiseSeparable(dim, kernel) for _ in range(3))  # type: ignore[assignment]

    def projected(self, x: Tensor, causal: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (self._apart(mapped(x, causal)) for mapped in (self.query, self.key, self.value))
        return query, key, value


def parameters(dim: int, kernel: int) -> int:
    """3 (c d + d + d² + d) + d² + d."""
    return 3 * (kernel * dim + dim + dim * dim + dim) + dim * dim + dim


def flops(dim: int, kernel: int, length: int) -> int:
    """Two per product: 2 L (3 (c d + d²) + d²) for the maps, 4 L² d for logits and sums."""
    return 2 * length * (3 * (kernel * dim + dim * dim) + dim * dim) + 4 * length * length * dim
