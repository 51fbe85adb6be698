"""Ranking as the paper's cost model has it: each candidate is the newest event of the history.

A candidate is a token after the history that sees the history and itself, so its score does not depend on
other candidates. Whether each comes with its own copy of the history (a batch of C histories of L + 1
events) or all stand after one copy (L + C events) makes no difference to a score, and all to the work:
formula (2) counts the former.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from compression.attention.base import HIDDEN, reach_bias
from compression.attention.depthwise import DepthwiseAttention
from compression.attention.full import FullAttention
from compression.retrieval.network import Layer, RetrievalNetwork
from compression.training.model import History


class CandidateRanker(nn.Module):
    """A retrieval network and what it takes to score candidates with it: a mark that says "asked, not
    seen", a readout of the candidate's state, and the weight of its fit to the user vector."""

    def __init__(self, network: RetrievalNetwork) -> None:
        super().__init__()
        for layer in network.layers:
            attention = cast(Layer, layer).attention
            if not isinstance(attention, FullAttention) or isinstance(attention, DepthwiseAttention):
                raise ValueError(
                    f"{type(attention).__name__} maps events together, candidates cannot be apart"
                )
        self.network = network
        self.mark = nn.Parameter(0.02 * torch.randn(network.config.dim))
        self.readout = nn.Linear(network.config.dim, 1, bias=False)
        self.fit = nn.Parameter(torch.tensor(1.0))
        nn.init.normal_(self.readout.weight, std=0.02)

    @property
    def layers(self) -> list[Layer]:
        return cast(list[Layer], list(self.network.layers))

    def forward(
        self, history: History, candidates: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """User vectors [B, L, d] after every event; scores [B, C] of candidate rows [B, C], each of which
        sees the first `seen` [B, C] events only; and the maps [B, heads, L + C, L + C] that are kept."""
        network = self.network
        length = history.items.shape[1]
        x = torch.cat([network.tokens(history), self.candidate_tokens(candidates)], 1)
        x = network.dropout(x)
        maps: list[Tensor | None] = []
        for layer in self.layers:
            attention = cast(FullAttention, layer.attention)
            query, key, value = attention.projected(layer.attention_norm(x))
            found, seen_map = attention.attended(query, key, value, packed_bias(length, layer.reach, seen))
            x = x + layer.dropout(found)
            x = x + layer.dropout(layer.ffn(layer.ffn_norm(x)))
            maps.append(seen_map)
        states = network.final_norm(x)
        users, asked = states[:, :length], states[:, length:]
        newest = (seen.long() - 1).clamp(min=0)[..., None].expand(-1, -1, states.shape[-1])
        fit = (users.gather(1, newest) * network.items(candidates)).sum(-1)
        learned: Tensor = self.readout(asked).squeeze(-1)
        return users, learned + self.fit * fit, maps

    def candidate_tokens(self, candidates: Tensor) -> Tensor:
        rows: Tensor = self.network.items(candidates)
        scale: float = self.network.config.dim**0.5
        return rows * scale + self.mark


def packed_bias(length: int, reach: Tensor | None, seen: Tensor) -> Tensor:
    """[B, heads or 1, L + C, L + C]: events look back; candidates at the first `seen` [B, C] events, the
    newest of which lies one back, and at themselves; nobody at a candidate."""
    users, count = seen.shape
    device = seen.device
    events = cast(Tensor, reach_bias(length, reach, True, device))
    events = events if events.ndim == 3 else events[None]
    heads = events.shape[0]
    back = seen[:, :, None] - torch.arange(length, device=device)
    if reach is None:
        to_events = torch.zeros(users, 1, count, length, device=device)
        own = torch.zeros(heads, device=device)
    else:
        table = reach if reach.ndim == 2 else reach[None]
        to_events = table[:, back.clamp(0, table.shape[1] - 1)].transpose(0, 1)
        own = table[:, 0]
    to_events = to_events.masked_fill(back[:, None] < 1, HIDDEN)
    others = torch.full((count, count), HIDDEN, device=device)
    apart = torch.eye(count, dtype=torch.bool, device=device)
    to_candidates = torch.where(apart, own[:, None, None], others).expand(users, -1, -1, -1)
    above = torch.cat(
        [events.expand(users, -1, -1, -1), events.new_full((users, heads, length, count), HIDDEN)], 3
    )
    return torch.cat([above, torch.cat([to_events.expand(-1, heads, -1, -1), to_candidates], 3)], 2)
