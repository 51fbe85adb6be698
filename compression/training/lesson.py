"""What a training may be asked beside its losses: a teacher's opinion, rounded weights, fixed zeros."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compression.training.model import History, Recommender


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A batch as it was put to the network. `rows` and `categories` [B, P C] are candidates, C after each
    of the places `turn` [B, P], which see `seen` [B, P C] events; `inside` [B, L] says which events are
    none of padding; `known` items can be recommended, rows 1 to `known`, of `row_categories`."""

    history: History
    rows: Tensor
    categories: Tensor
    seen: Tensor
    turn: Tensor
    inside: Tensor
    known: int
    row_categories: Tensor


class Lesson:
    """One that asks nothing. `train` calls `begin` before the first step and `end` once the best weights
    are back in the model; `loss` is added to those of the batch."""

    def begin(self, model: Recommender) -> None:
        pass

    def loss(self, model: Recommender, asked: Asked, user_vectors: Tensor, scores: Tensor) -> Tensor:
        """`user_vectors` [B, L, D] after every event and `scores` [B, P C] are the model's answers."""
        return torch.zeros(())

    def end(self, model: Recommender) -> None:
        pass
