"""The network: a causal transformer over a user's events, with two uses.

Retrieval: the normalised state at the last event is the user vector; an item's score is its dot
product with the item's row of the tied table. Ranking: each candidate is one more token after the
history, which attends to the history and to a slot that stands for "nothing there", so its score
cannot depend on the other candidates. Histories are right padded and attention is causal, so padding
is never attended to; keys and values know nothing of what follows, so an appended event leaves those
before it as they were.

Fifty candidates ask for every list that is served, so what asks is kept bare: attention has one head
and its query and output projections are part of the keys and values, which are computed once per
event; how far back an event lies is a number added to its logit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compression.releases.registry import ModelShape
from features.encoding import BEHAVIOR_ROWS, CANDIDATE_BEHAVIOR, GAP_ROWS

MASKED = -1e9
NORM_EPS = 1e-6


class History(NamedTuple):
    """Events as table rows, each [B, L]; lengths [B]."""

    items: Tensor
    categories: Tensor
    behaviors: Tensor
    gaps: Tensor
    lengths: Tensor


class Encoded(NamedTuple):
    """A history, encoded once: user_vector [B, D]; states [B, L, D] as `ModelShape.state_names` has them."""

    user_vector: Tensor
    states: tuple[Tensor, ...]


class Block(nn.Module):
    """One pre-norm layer. History and candidates share its weights."""

    def __init__(self, shape: ModelShape, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.dim, eps=NORM_EPS)
        self.key = nn.Linear(shape.dim, shape.dim, bias=False)
        self.value = nn.Linear(shape.dim, shape.dim, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.dim, eps=NORM_EPS)
        self.widen = nn.Linear(shape.dim, shape.ffn, bias=False)
        self.narrow = nn.Linear(shape.ffn, shape.dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.maps: deque[Tensor] | None = None
        """Attention maps [B, T, S] in the order they are made, where somebody has put a deque here."""
        # Added to the logit of an event by how many events back it lies, seen from an event, 0 for
        # itself, and from a candidate, 0 for the newest.
        self.event_reach = nn.Parameter(torch.zeros(shape.max_history))
        self.candidate_reach = nn.Parameter(torch.zeros(shape.max_history))
        # The slot beside the history; what candidates find in the history outweighs it, at first by this.
        self.nothing_key = nn.Parameter(torch.zeros(shape.dim))
        self.nothing_value = nn.Parameter(torch.zeros(shape.dim))
        self.nothing_reach = nn.Parameter(torch.tensor([-4.0]))
        # Attention starts as "find the same item or category and bring it along", which a log too
        # small to teach it still needs: people come back to what they saw.
        same = torch.eye(shape.dim)
        for weight, start in ((self.key.weight, same), (self.value.weight, 0.5 * same)):
            nn.init.normal_(weight, std=0.02)
            weight.data += start

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both [B, L, D] of events [B, L, D]; keys are scaled for the dot product."""
        normed = self.attention_norm(x)
        return self.key(normed) * x.shape[-1] ** -0.5, self.value(normed)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, reach: Tensor) -> Tensor:
        """Tokens [B, T, D], each of which attends to what `reach` [B, T or 1, S] lets it."""
        weights = (self.attention_norm(x) @ key.transpose(1, 2) + reach).softmax(-1)
        if self.maps is not None:
            self.maps.append(weights)
        x = x + self.dropout(weights @ value)
        return x + cast(Tensor, self.dropout(self.narrow(self.widen(self.ffn_norm(x)).relu())))

    def candidates(self, x: Tensor, key: Tensor, value: Tensor, before: Tensor) -> Tensor:
        """Candidates [B, T, D] after the first `before` [B, T or 1, 1] events."""
        batch, _, dim = key.shape
        slots = torch.arange(key.shape[1], device=key.device)
        reach = reach_table(self.candidate_reach)[(before - slots).clamp(min=0)]
        found: Tensor = self(
            x,
            torch.cat([key, self.nothing_key.expand(batch, 1, dim)], 1),
            torch.cat([value, self.nothing_value.expand(batch, 1, dim)], 1),
            torch.cat([reach, self.nothing_reach.expand(*reach.shape[:2], 1)], 2),
        )
        return found

    def events(self, x: Tensor, key: Tensor, value: Tensor, places: Tensor) -> Tensor:
        """The events [B, T, D] at some places [B or 1, T, 1] of the history; each sees those up to itself."""
        slots = torch.arange(key.shape[1], device=key.device)
        reach = reach_table(self.event_reach)[(places - slots + 1).clamp(min=0)]
        seen: Tensor = self(x, key, value, reach)
        return seen

    def appended(
        self, x: Tensor, key: Tensor, value: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One more event [B, 1, D] after the first `before` [B, 1, 1] whose keys and values [B, L, D] are
        given; also its own key and value [B, 1, D]."""
        own_key, own_value = self.keys_values(x)
        slots = torch.arange(key.shape[1], device=key.device)
        # Without the 0 for the event itself: its own slot in `key` is still padding.
        reach = reach_table(self.event_reach[1:])[(before - slots).clamp(min=0)]
        own_reach = self.event_reach[:1].expand(len(x), 1, 1)
        seen: Tensor = self(
            x,
            torch.cat([key, own_key], 1),
            torch.cat([value, own_value], 1),
            torch.cat([reach, own_reach], 2),
        )
        return seen, own_key, own_value


class Recommender(nn.Module):
    """The whole network. Sizes come from the shape in the manifest and from nowhere else."""

    def __init__(self, shape: ModelShape, dropout: float = 0.0) -> None:
        super().__init__()
        if shape.heads != 1:
            raise ValueError(f"this network has one head, not {shape.heads}")
        self.shape = shape
        self.items = nn.Embedding(shape.item_rows, shape.dim, padding_idx=0)
        self.categories = nn.Embedding(shape.category_rows, shape.dim, padding_idx=0)
        self.behaviors = nn.Embedding(BEHAVIOR_ROWS, shape.dim, padding_idx=0)
        self.gaps = nn.Embedding(GAP_ROWS, shape.dim)
        self.blocks = nn.ModuleList(Block(shape, dropout) for _ in range(shape.layers))
        self.final_norm = nn.RMSNorm(shape.dim, eps=NORM_EPS)
        self.no_history = nn.Parameter(torch.zeros(shape.dim))
        self.readout = nn.Linear(shape.dim, 1, bias=False)
        self.affinity_scale = nn.Parameter(torch.tensor(1.0))
        self.found_scale = nn.Parameter(torch.tensor(1.0))
        self.dropout = nn.Dropout(dropout)
        for table in (self.items, self.categories, self.behaviors, self.gaps):
            nn.init.normal_(table.weight, std=shape.dim**-0.5)
            if table.padding_idx is not None:
                nn.init.zeros_(table.weight[table.padding_idx])

    def item_vectors(self, items: Tensor, categories: Tensor) -> Tensor:
        """What an item is, as input and as target alike: its own row plus its category's."""
        return cast(Tensor, self.items(items)) + cast(Tensor, self.categories(categories))

    def tokens(self, history: History) -> Tensor:
        known = self.item_vectors(history.items, history.categories)
        return cast(Tensor, self.dropout(known + self.behaviors(history.behaviors) + self.gaps(history.gaps)))

    def candidate_mark(self) -> Tensor:
        """[D]: what the token of a candidate has beside its `item_vectors`."""
        return self.behaviors.weight[CANDIDATE_BEHAVIOR] + self.gaps.weight[0]

    def candidate_tokens(self, vectors: Tensor) -> Tensor:
        """The tokens of candidates whose `item_vectors` are given."""
        return vectors + self.candidate_mark()

    def encode(self, history: History) -> Encoded:
        """Histories to what candidates need. In the last layer only the newest event asks."""
        places = torch.arange(history.items.shape[1], device=history.items.device)[None, :, None]
        x = self.tokens(history)
        states: tuple[Tensor, ...] = ()
        for block in self._layers[:-1]:
            key, value = block.keys_values(x)
            x = block.events(x, key, value, places)
            states += (key, value)
        key, value = self._layers[-1].keys_values(x)
        newest = (history.lengths.long() - 1).clamp(min=0)[:, None, None]
        asking = x.gather(1, newest.expand(-1, 1, x.shape[-1]))
        state = self._layers[-1].events(asking, key, value, newest).squeeze(1)
        state = torch.where(history.lengths[:, None] > 0, state, self.no_history)
        return Encoded(self.final_norm(state), (*states, key, value))

    def append(self, states: Sequence[Tensor], event: History) -> Encoded:
        """One more event [B, 1] after `event.lengths` < max_history events with these states: the user
        vector, and the states of that event [B, 1, D]."""
        before = event.lengths.long()[:, None, None]
        x = self.tokens(event)
        new: tuple[Tensor, ...] = ()
        for block, key, value in zip(self._layers, states[::2], states[1::2], strict=True):
            x, own_key, own_value = block.appended(x, key, value, before)
            new += (own_key, own_value)
        return Encoded(self.final_norm(x.squeeze(1)), new)

    def score(self, encoded: Encoded, lengths: Tensor, items: Tensor, categories: Tensor) -> Tensor:
        """Scores [B, C] of candidate items [B, C] after encoded histories."""
        vectors = self.item_vectors(items, categories)
        before = lengths.long()[:, None, None]
        x = self.candidate_tokens(vectors)
        for block, key, value in zip(self._layers, encoded.states[::2], encoded.states[1::2], strict=True):
            x = block.candidates(x, key, value, before)
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
        places = torch.arange(history.items.shape[1], device=seen.device)[None, :, None]
        x = self.tokens(history)
        asked = self.candidate_tokens(vectors)
        for block in self._layers:
            key, value = block.keys_values(x)
            x = block.events(x, key, value, places)
            asked = block.candidates(asked, key, value, seen[..., None])
        return self.final_norm(x), asked

    @property
    def _layers(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))


def reach_table(reach: Tensor) -> Tensor:
    """By 1 + events back; the 0 before it is for events that come after the one that asks."""
    return F.pad(reach, (1, 0), value=MASKED)
