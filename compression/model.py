"""The network: a causal transformer over a user's events, with two uses.

Retrieval: the normalised state at the last event is the user vector; an item's score is its dot
product with the item's row of the tied table. Ranking: each candidate is one more token after the
history, which attends to the history and to itself only, so its score cannot depend on the other
candidates. Histories are right padded and attention is causal, so padding is never attended to;
positions count from the start, so an appended event leaves the keys and values before it as they were.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compression.registry import ModelShape
from features.encoding import BEHAVIOR_ROWS, CANDIDATE_BEHAVIOR, GAP_ROWS

MASKED = -1e9


class History(NamedTuple):
    """Events as table rows, each [B, L]; lengths [B]."""

    items: Tensor
    categories: Tensor
    behaviors: Tensor
    gaps: Tensor
    lengths: Tensor


class Rotation(NamedTuple):
    """The angles of some positions; each broadcasts to [B, heads, T, D/heads/2]."""

    cos: Tensor
    sin: Tensor


class Encoded(NamedTuple):
    """A history, encoded once: user_vector [B, D]; keys and values [B, layers, heads, L, D/heads]."""

    user_vector: Tensor
    keys: Tensor
    values: Tensor


class Block(nn.Module):
    """One pre-norm layer. History and candidates share its weights."""

    def __init__(self, shape: ModelShape, dropout: float) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attention_norm = nn.RMSNorm(shape.dim, eps=1e-6)
        self.query = nn.Linear(shape.dim, shape.dim, bias=False)
        self.key_value = nn.Linear(shape.dim, 2 * shape.dim, bias=False)
        self.output = nn.Linear(shape.dim, shape.dim, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.dim, eps=1e-6)
        self.ffn = nn.Sequential(
            nn.Linear(shape.dim, shape.ffn), nn.GELU(approximate="tanh"), nn.Linear(shape.ffn, shape.dim)
        )
        self.dropout = nn.Dropout(dropout)
        self.self_bias = nn.Parameter(torch.full((shape.heads, 1, 1), -4.0))
        # Attention starts as "find the same item or category and bring it along", which a log too
        # small to teach it still needs: people come back to what they saw.
        same = torch.eye(shape.dim)
        for weight, start in ((self.query.weight, same), (self.output.weight, 0.5 * same)):
            nn.init.normal_(weight, std=0.02)
            weight.data += start
        nn.init.normal_(self.key_value.weight, std=0.02)
        self.key_value.weight.data += torch.cat([same, same])

    def keys_values(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """[B, T, D] to rotated keys and to values, each [B, heads, T, D/heads]."""
        key, value = self.key_value(self.attention_norm(x)).chunk(2, dim=-1)
        return rotate(self._split(key), rotation), self._split(value)

    def queries(self, x: Tensor, rotation: Rotation) -> Tensor:
        return rotate(self._split(self.query(self.attention_norm(x))), rotation)

    def history(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Every event attends to itself and to those before it."""
        key, value = self.keys_values(x, rotation)
        mixed = F.scaled_dot_product_attention(self.queries(x, rotation), key, value, is_causal=True)
        return self._finish(x, mixed), key, value

    def candidates(self, x: Tensor, rotation: Rotation, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
        """Candidates after a history: what they find there outweighs themselves, by a learned bias."""
        return self.isolated(x, rotation, key, value, hidden, self_bias=self.self_bias)

    def isolated(
        self,
        x: Tensor,
        rotation: Rotation,
        key: Tensor,
        value: Tensor,
        hidden: Tensor,
        *,
        self_bias: Tensor | float = 0.0,
    ) -> Tensor:
        """Tokens after a history: each attends to the events not `hidden` [B, 1, T or 1, L] and to itself."""
        own_key, own_value = self.keys_values(x, rotation)
        query = self.queries(x, rotation) * own_key.shape[-1] ** -0.5
        to_history = (query @ key.transpose(-1, -2)).masked_fill(hidden, MASKED)
        to_self = (query * own_key).sum(-1, keepdim=True) + self_bias
        weights = torch.cat([to_history, to_self], dim=-1).softmax(-1)
        mixed = weights[..., :-1] @ value + weights[..., -1:] * own_value
        return self._finish(x, mixed)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.dropout(self.output(mixed.transpose(1, 2).flatten(2)))
        return x + cast(Tensor, self.dropout(self.ffn(self.ffn_norm(x))))


class Recommender(nn.Module):
    """The whole network. Sizes come from the shape in the manifest and from nowhere else."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: ModelShape, dropout: float = 0.0) -> None:
        super().__init__()
        if shape.dim % (2 * shape.heads):
            raise ValueError(f"dim {shape.dim} is not a multiple of twice the {shape.heads} heads")
        self.shape = shape
        self.items = nn.Embedding(shape.item_rows, shape.dim, padding_idx=0)
        self.categories = nn.Embedding(shape.category_rows, shape.dim, padding_idx=0)
        self.behaviors = nn.Embedding(BEHAVIOR_ROWS, shape.dim, padding_idx=0)
        self.gaps = nn.Embedding(GAP_ROWS, shape.dim)
        self.blocks = nn.ModuleList(Block(shape, dropout) for _ in range(shape.layers))
        self.final_norm = nn.RMSNorm(shape.dim, eps=1e-6)
        self.no_history = nn.Parameter(torch.zeros(shape.dim))
        self.readout = nn.Sequential(
            nn.Linear(shape.dim, shape.dim), nn.GELU(approximate="tanh"), nn.Linear(shape.dim, 1)
        )
        self.affinity_scale = nn.Parameter(torch.tensor(1.0))
        self.found_scale = nn.Parameter(torch.tensor(1.0))
        self.dropout = nn.Dropout(dropout)
        for table in (self.items, self.categories, self.behaviors, self.gaps):
            nn.init.normal_(table.weight, std=shape.dim**-0.5)
            if table.padding_idx is not None:
                nn.init.zeros_(table.weight[table.padding_idx])
        half = shape.dim // shape.heads // 2
        angles = torch.outer(torch.arange(shape.max_history + 1), 10_000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def item_vectors(self, items: Tensor, categories: Tensor) -> Tensor:
        """What an item is, as input and as target alike: its own row plus its category's."""
        return cast(Tensor, self.items(items)) + cast(Tensor, self.categories(categories))

    def tokens(self, history: History) -> Tensor:
        known = self.item_vectors(history.items, history.categories)
        return cast(Tensor, self.dropout(known + self.behaviors(history.behaviors) + self.gaps(history.gaps)))

    def candidate_tokens(self, vectors: Tensor) -> Tensor:
        """The tokens of candidates whose `item_vectors` are given."""
        return vectors + self.behaviors.weight[CANDIDATE_BEHAVIOR] + self.gaps.weight[0]

    def encode(self, history: History) -> Encoded:
        """Histories to what candidates need. In the last layer only the newest event asks."""
        slots = history.items.shape[1]
        rotation = Rotation(self.cos[:slots], self.sin[:slots])
        x = self.tokens(history)
        keys, values = [], []
        for block in self._layers[:-1]:
            x, key, value = block.history(x, rotation)
            keys.append(key)
            values.append(value)
        key, value = self._layers[-1].keys_values(x, rotation)
        newest = (history.lengths.long() - 1).clamp(min=0)[:, None, None]
        state = self._layers[-1].isolated(
            x.gather(1, newest.expand(-1, 1, x.shape[-1])),
            self._rotation(newest),
            key,
            value,
            # The newest event is there as the asking token itself.
            (torch.arange(slots, device=x.device) >= newest)[:, None],
        )
        state = torch.where(history.lengths[:, None] > 0, state.squeeze(1), self.no_history)
        return Encoded(self.final_norm(state), torch.stack([*keys, key], 1), torch.stack([*values, value], 1))

    def score(self, encoded: Encoded, lengths: Tensor, items: Tensor, categories: Tensor) -> Tensor:
        """Scores [B, C] of candidate items [B, C] after encoded histories."""
        vectors = self.item_vectors(items, categories)
        position = lengths.long()[:, None, None]
        hidden = torch.arange(encoded.keys.shape[3], device=position.device) >= position
        x = self.candidate_tokens(vectors)
        for layer, block in enumerate(self._layers):
            key, value = encoded.keys[:, layer], encoded.values[:, layer]
            x = block.candidates(x, self._rotation(position), key, value, hidden[:, None])
        return self.readout_scores(x, vectors, encoded.user_vector[:, None])

    def readout_scores(self, states: Tensor, vectors: Tensor, user_vectors: Tensor) -> Tensor:
        """Scores from candidates' last states: a learned readout, how well the item fits the user vector,
        and how much of the item was found in the history."""
        affinity = (vectors * user_vectors).sum(-1)
        found = (vectors * (states - self.candidate_tokens(vectors))).sum(-1)
        learned = cast(Tensor, self.readout(self.final_norm(states))).squeeze(-1)
        return learned + self.affinity_scale * affinity + self.found_scale * found

    def forward(self, history: History, vectors: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """For training: user vectors after every event [B, L, D], and the last states of candidates
        [B, S, D] given by their vectors, each of which sees its first `seen` [B, S] events only."""
        slots = torch.arange(history.items.shape[1], device=seen.device)
        rotation, own = self._rotation(slots), self._rotation(seen[:, None])
        hidden = (slots >= seen[..., None])[:, None]
        x = self.tokens(history)
        asked = self.candidate_tokens(vectors)
        for block in self._layers:
            x, key, value = block.history(x, rotation)
            asked = block.candidates(asked, own, key, value, hidden)
        return self.final_norm(x), asked

    @property
    def _layers(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def _rotation(self, positions: Tensor) -> Rotation:
        return Rotation(self.cos[positions], self.sin[positions])


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary positions: x [B, heads, T, d]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
