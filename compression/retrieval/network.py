"""A standard causal transformer over a user's events; an item's score is its row times the user vector.

Pre-norm layers of attention (`compression.attention`) and a feed-forward part, positions learned from
the end of the window backwards, and a number per distance and head that is added to the attention's
logits. The table of items is input and output alike. A network without positions can be appended to: one
more event leaves what was made of those before it as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Final, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from compression.attention.base import HIDDEN, Attention
from compression.attention.dropout import ByteDropout
from compression.attention.full import FullAttention, written
from compression.training.model import Encoded, History
from features.encoding import BEHAVIOR_ROWS, GAP_ROWS

INIT_STD: Final = 0.02


class NetworkConfig(BaseModel):
    """Everything needed to build the network again before its weights are loaded. `ffn` is the inner
    width of the feed-forward part; `item_rows` counts padding and hash buckets too, and so do
    `category_rows`, of which 0 says that categories are not read. `positions` are added to the events,
    `lateness` to what the layers make of one: both by how many events of the window come after."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dim: Annotated[int, Field(ge=2, le=4096)] = 64
    layers: Annotated[int, Field(ge=1, le=64)] = 2
    heads: Annotated[int, Field(ge=1, le=64)] = 1
    ffn: Annotated[int, Field(ge=1, le=65536)] = 256
    activation: Literal["gelu", "relu", "swiglu"] = "gelu"
    max_history: Annotated[int, Field(ge=1, le=4096)] = 200
    positions: bool = True
    lateness: bool = False
    reach: bool = True
    behaviors: bool = False
    gaps: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    item_rows: Annotated[int, Field(ge=2, le=2**31)]
    category_rows: Annotated[int, Field(ge=0, le=2**31)] = 0

    @model_validator(mode="after")
    def _heads_divide(self) -> NetworkConfig:
        if self.dim % self.heads:
            raise ValueError(f"{self.heads} heads do not divide {self.dim} dimensions")
        return self

    @property
    def appends(self) -> bool:
        """Whether an event more leaves what was made of the events before it as it was."""
        return not self.positions


AttentionFactory = Callable[[NetworkConfig], Attention]


def full_attention(config: NetworkConfig) -> Attention:
    return FullAttention(config.dim, config.heads, config.dropout)


class FeedForward(nn.Module):
    """Wide and narrow again, with an activation or a gate between."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.activation = config.activation
        wide = 2 * config.ffn if config.activation == "swiglu" else config.ffn
        self.widen = nn.Linear(config.dim, wide)
        self.narrow = nn.Linear(config.ffn, config.dim)
        for linear in (self.widen, self.narrow):
            nn.init.normal_(linear.weight, std=INIT_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.widen(x)
        if self.activation == "swiglu":
            gate, kept = wide.chunk(2, -1)
            wide = F.silu(gate) * kept
        else:
            wide = F.gelu(wide) if self.activation == "gelu" else F.relu(wide)
        return cast(Tensor, self.narrow(wide))


class Layer(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: NetworkConfig, attention: Attention) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = attention
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.ffn = FeedForward(config)
        self.dropout = ByteDropout(config.dropout)
        reach = torch.zeros(config.heads, config.max_history)
        self.reach = nn.Parameter(reach) if config.reach else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        found, seen = self.attention(self.attention_norm(x), self.reach)
        return self._onward(x, found), seen

    def encoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` without the map, and the events' states [B, L, d]: what keys and values are made of."""
        state = self.attention_norm(x)
        return self._onward(x, self.attention(state, self.reach)[0]), state

    def appended(self, x: Tensor, states: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """One more event [B, 1, d] after the first `before` [B] of those whose states [B, L, d] are given;
        also its own state [B, 1, d]."""
        attention, state = written(self.attention), self.attention_norm(x)
        query = attention.projected(state)[0]
        _, key, value = attention.projected(torch.cat([states, state], 1))
        back = before[:, None] - torch.arange(states.shape[1], device=x.device)
        reach = self.reach if self.reach is not None else torch.zeros(1, states.shape[1] + 1, device=x.device)
        bias = reach[:, back.clamp(min=0)].masked_fill(back < 1, HIDDEN).transpose(0, 1)
        own = reach[:, :1].expand(len(x), -1, -1)
        found, _ = attention.attended(query, key, value, torch.cat([bias, own], 2)[:, :, None])
        return self._onward(x, found), state

    def _onward(self, x: Tensor, found: Tensor) -> Tensor:
        x = x + self.dropout(found)
        return x + cast(Tensor, self.dropout(self.ffn(self.ffn_norm(x))))


class RetrievalNetwork(nn.Module):
    """The whole network."""

    item_categories: Tensor

    def __init__(self, config: NetworkConfig, attention: AttentionFactory = full_attention) -> None:
        super().__init__()
        self.config = config
        self.items = nn.Embedding(config.item_rows, config.dim, padding_idx=0)
        self.positions = nn.Embedding(config.max_history, config.dim) if config.positions else None
        self.lateness = nn.Embedding(config.max_history, config.dim) if config.lateness else None
        self.behaviors = nn.Embedding(BEHAVIOR_ROWS, config.dim) if config.behaviors else None
        self.gaps = nn.Embedding(GAP_ROWS, config.dim) if config.gaps else None
        self.layers = nn.ModuleList(Layer(config, attention(config)) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.dim)
        self.dropout = ByteDropout(config.dropout)
        self.categories = nn.Embedding(config.category_rows, config.dim) if config.category_rows else None
        if self.categories is not None:
            self.register_buffer("item_categories", torch.zeros(config.item_rows, dtype=torch.int64))
        for table in (
            *(self.items, self.categories, self.positions, self.lateness, self.behaviors, self.gaps),
        ):
            if table is not None:
                nn.init.normal_(table.weight, std=INIT_STD)
        nn.init.zeros_(self.items.weight[0])
        if self.categories is not None:
            nn.init.zeros_(self.categories.weight[0])

    def table(self) -> Tensor:
        """[item_rows, d]: an item's score is its row here times the user vector. With categories it is the
        item's own row plus that of its category, which `item_categories` [item_rows] names."""
        if self.categories is None:
            return self.items.weight
        return self.items.weight + cast(Tensor, self.categories(self.item_categories))

    def rows(self, items: Tensor) -> Tensor:
        """[..., d]: the rows of `table` at some places."""
        found = cast(Tensor, self.items(items))
        return found if self.categories is None else found + self.categories(self.item_categories[items])

    def forward(self, history: History) -> Tensor:
        """User vectors [B, L, d] after every event of right-padded histories of at most max_history."""
        return self.states(history)[0]

    def states(self, history: History) -> tuple[Tensor, list[Tensor | None]]:
        """User vectors as above, and the attention map of every layer that keeps one."""
        x = self.dropout(self.tokens(history))
        maps: list[Tensor | None] = []
        for layer in self.layers:
            x, seen = layer(x)
            maps.append(seen)
        if self.lateness is not None:
            x = x + self.lateness(_after(history))
        return cast(Tensor, self.final_norm(x)), maps

    @torch.no_grad()
    def start_with_recent(self, power: float) -> None:
        """Let attention begin as a mean of the events up to each, weighed (1 + events back)^-power and
        brought along as they are, which a log too small to teach it needs: people come back to what they
        saw."""
        for layer in cast(list[Layer], list(self.layers)):
            attention = written(layer.attention)
            same = torch.eye(self.config.dim)
            attention.value.weight += same
            attention.out.weight += same
            if layer.reach is not None:
                layer.reach.sub_(power * torch.log1p(torch.arange(self.config.max_history)))

    def user_vectors(self, history: History) -> Tensor:
        """[B, d] after the newest event of each history, which holds at least one."""
        newest = (history.lengths.long() - 1)[:, None, None]
        states: Tensor = self(history)
        return states.gather(1, newest.expand(-1, 1, self.config.dim)).squeeze(1)

    def encode(self, history: History) -> Encoded:
        """User vectors of histories that hold at least one event, with the states [B, L, d] of all slots."""
        x = self.tokens(history)
        states: tuple[Tensor, ...] = ()
        for layer in cast(list[Layer], list(self.layers)):
            x, state = layer.encoded(x)
            states += (state,)
        newest = (history.lengths.long() - 1)[:, None, None].expand(-1, 1, self.config.dim)
        vectors = self._vectors(x.gather(1, newest).squeeze(1))
        return Encoded(vectors, states)

    def append(self, states: Sequence[Tensor], event: History) -> Encoded:
        """One more event [B, 1] after `event.lengths` < max_history events with these states: the user
        vector, and the event's states [B, 1, d]. For networks that `appends` is true of."""
        x, before = self.tokens(event), event.lengths.long()
        new: tuple[Tensor, ...] = ()
        for layer, known in zip(cast(list[Layer], list(self.layers)), states, strict=True):
            x, state = layer.appended(x, known, before)
            new += (state,)
        return Encoded(self._vectors(x.squeeze(1)), new)

    def tokens(self, history: History) -> Tensor:
        x = self.items(history.items)
        if self.categories is not None:
            x = x + self.categories(history.categories)
        x = x * self.config.dim**0.5
        if self.positions is not None:
            x = x + self.positions(_after(history))
        if self.behaviors is not None:
            x = x + self.behaviors(history.behaviors)
        if self.gaps is not None:
            x = x + self.gaps(history.gaps)
        return cast(Tensor, x)

    def _vectors(self, newest: Tensor) -> Tensor:
        """User vectors of the last layer's states [B, d] at the newest events."""
        if self.lateness is not None:
            newest = newest + self.lateness.weight[0]
        return cast(Tensor, self.final_norm(newest))


def _after(history: History) -> Tensor:
    """[B, L]: how many events of the window come after each; 0 for padding."""
    slots = torch.arange(history.items.shape[1], device=history.items.device)
    return (history.lengths.long()[:, None] - 1 - slots).clamp(min=0)
