"""Hybrid sparse attention: all of a local window, and a few samples of the rest (III.A, 5; formula 4)."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from compression.attention.base import HIDDEN, Attention
from compression.attention.full import FullAttention

Sampling = Literal["fixed", "random"]


def samples_of(length: int) -> int:
    """log₂ L, rounded up: how many events beyond its window each event looks at."""
    return max(1, int(np.ceil(np.log2(length)))) if length > 1 else 0


@lru_cache(maxsize=256)
def neighbours(
    length: int, window: int, causal: bool = True, sampling: Sampling = "fixed", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Which events each of L events looks at: places [L, window + samples] and whether they are there.

    The window of an event is itself and the `window` - 1 before it or, where not causal, on either side.
    Samples lie outside, none twice: at even strides, or drawn with the seed and the event's place."""
    width = (window if causal else 2 * window - 1) + samples_of(length)
    places, there = np.zeros((length, width), np.int64), np.zeros((length, width), bool)
    for event in range(length):
        last = event + 1 if causal else min(length, event + window)
        first = max(0, event - window + 1)
        rest = np.concatenate([np.arange(first), np.arange(last, event + 1 if causal else length)])
        count = min(samples_of(length), len(rest))
        if sampling == "fixed":
            chosen = rest[(np.arange(count) * len(rest)) // max(1, count)]
        else:
            chosen = np.random.default_rng([seed, event]).choice(rest, count, replace=False)
        seen = np.concatenate([np.arange(first, last), chosen])
        places[event, : len(seen)], there[event, : len(seen)] = seen, True
    return torch.from_numpy(places), torch.from_numpy(there)


class SparseAttention(Attention):
    """Full projections; each event attends to w + log₂ L events: O(L w d + L log L d).

    The map, where it is kept, has zeros for what was not looked at."""

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        dropout: float = 0.0,
        *,
        window: int = 16,
        sampling: Sampling = "fixed",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"a window holds at least the event itself, not {window} events")
        self.dense = FullAttention(dim, heads, dropout)
        self.window, self.sampling, self.seed = window, sampling, seed

    def forward(
        self, x: Tensor, reach: Tensor | None = None, causal: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        length = x.shape[1]
        query, key, value = self.dense.projected(x, causal)
        places, there = (
            part.to(x.device) for part in neighbours(length, self.window, causal, self.sampling, self.seed)
        )
        near_keys, near_values = key[:, :, places], value[:, :, places]  # [B, heads, L, w + s, d / heads]
        logits = torch.matmul(near_keys, (query * query.shape[-1] ** -0.5).unsqueeze(-1)).squeeze(-1)
        if reach is not None:
            back = (torch.arange(length, device=x.device)[:, None] - places).abs()
            logits = logits + reach[..., back]
        weights = logits.masked_fill(~there, HIDDEN).softmax(-1)
        found = torch.matmul(self.dense.dropout(weights).unsqueeze(-2), near_values).squeeze(-2)
        out: Tensor = self.dense.out(found.transpose(1, 2).flatten(2))
        return out, self._map(weights, places) if self.keep_map else None

    @staticmethod
    def _map(weights: Tensor, places: Tensor) -> Tensor:
        empty = weights.new_zeros(*weights.shape[:3], weights.shape[2])
        return empty.scatter_add(3, places.expand_as(weights), weights)


def parameters(dim: int) -> int:
    """4 (d² + d): the maps are full ones."""
    return 4 * (dim * dim + dim)


def flops(dim: int, window: int, length: int) -> int:
    """Two per product, causal: 8 L d² for the maps, 4 L (w + log₂ L) d for logits and sums (formula 4)."""
    return 8 * length * dim * dim + 4 * length * (window + samples_of(length)) * dim
