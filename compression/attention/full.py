"""Plain multi-head attention: what every lighter variant is measured against."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compression.attention.base import Attention, reach_bias
from compression.attention.dropout import ByteDropout


class FullAttention(Attention):
    """softmax(q·k / sqrt(d / heads) + reach) · v, between four d x d projections with biases."""

    def __init__(self, dim: int, heads: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide {dim} dimensions")
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = ByteDropout(dropout)
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(
        self, x: Tensor, reach: Tensor | None = None, causal: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        batch, length, dim = x.shape
        query, key, value = (self._apart(linear(x)) for linear in (self.query, self.key, self.value))
        logits = torch.matmul(query * (dim // self.heads) ** -0.5, key.transpose(2, 3))
        bias = reach_bias(length, reach, causal, x.device)
        weights = (logits if bias is None else logits + bias).softmax(-1)
        found = torch.matmul(self.dropout(weights), value).transpose(1, 2).reshape(batch, length, dim)
        return self.out(found), weights if self.keep_map else None

    def _apart(self, x: Tensor) -> Tensor:
        """[B, L, d] to [B, heads, L, d / heads]."""
        batch, length, dim = x.shape
        return x.view(batch, length, self.heads, dim // self.heads).transpose(1, 2)
