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
        query, key, value = self.projected(x, causal)
        return self.attended(query, key, value, reach_bias(x.shape[1], reach, causal, x.device))

    def projected(self, x: Tensor, causal: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [B, heads, L, d / heads] of x [B, L, d]."""
        return self._apart(self.query(x)), self._apart(self.key(x)), self._apart(self.value(x))

    def attended(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What queries [B, heads, T, d / heads] find among keys and values of S events, [B, T, d], and the
        map; `bias` broadcasts to [B, heads, T, S]."""
        logits = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(2, 3))
        weights = (logits if bias is None else logits + bias).softmax(-1)
        found = torch.matmul(self.dropout(weights), value).transpose(1, 2).flatten(2)
        return self.out(found), weights if self.keep_map else None

    def _apart(self, x: Tensor) -> Tensor:
        """[B, L, d] to [B, heads, L, d / heads]."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


def written(attention: Attention) -> FullAttention:
    """The attention of a layer that is to become a graph: of this kind only, `ValueError` otherwise."""
    if type(attention) is not FullAttention:
        raise ValueError(f"only full attention is written, not {type(attention).__name__}")
    return attention
