"""What a stage of a compression learns beside the losses of any training: what the whole network says."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from typing import Final

import torch
from torch import Tensor

from compression.smaller.distil import maps_divergence, opinion_divergence
from compression.smaller.plan import Compression
from compression.smaller.quantization import aware
from compression.training.lesson import Asked, Lesson
from compression.training.model import Block, Recommender
from compression.training.weights import TABLE_GRID, TABLES

_ASKED_ITEMS: Final = 512  # of the catalogue, that a teacher is asked about per batch
_ASKED_STATES: Final = 256  # events of a batch after which it is asked


class Taught(Lesson):
    """A teacher says what it thinks of the candidates and of some of the catalogue, and where it looks."""

    def __init__(self, teacher: Recommender, plan: Compression) -> None:
        self._teacher, self._plan = teacher.eval(), plan

    def loss(self, model: Recommender, asked: Asked, user_vectors: Tensor, scores: Tensor) -> Tensor:
        plan, teacher = self._plan, self._teacher
        own_maps = _taken(model) if plan.maps else ([], [])
        with torch.no_grad():
            vectors = teacher.item_vectors(asked.rows, asked.categories)
            their_vectors, states = teacher(asked.history, vectors, asked.seen)
            count = asked.rows.shape[1] // asked.turn.shape[1]
            at = asked.turn[..., None].expand(-1, -1, their_vectors.shape[-1])
            asking = their_vectors.gather(1, at).repeat_interleave(count, dim=1)
            their_scores = teacher.readout_scores(states, vectors, asking)
            their_maps = _taken(teacher) if plan.maps else ([], [])
        said = opinion_divergence(scores.view(-1, count), their_scores.view(-1, count))
        events = asked.inside.nonzero()
        events = events[torch.randperm(len(events))[:_ASKED_STATES]]
        rows = 1 + torch.randint(asked.known, (_ASKED_ITEMS,))
        of_rows = asked.row_categories[rows]
        ours = user_vectors[events[:, 0], events[:, 1]] @ model.item_vectors(rows, of_rows).T
        with torch.no_grad():
            theirs = their_vectors[events[:, 0], events[:, 1]] @ teacher.item_vectors(rows, of_rows).T
        said = said + opinion_divergence(ours, theirs)
        if not plan.maps:
            return plan.opinions * said
        asking = (asked.inside.float(), torch.ones(asked.rows.shape))
        looked = [maps_divergence(*maps) for maps in zip(own_maps, their_maps, asking, strict=True)]
        return plan.opinions * said + plan.maps * (looked[0] + looked[1])

    def begin(self, model: Recommender) -> None:
        for block in (*_blocks(model), *_blocks(self._teacher)):
            # A layer is asked for events, then for candidates.
            block.maps = deque(maxlen=2) if self._plan.maps else None

    def end(self, model: Recommender) -> None:
        for block in (*_blocks(model), *_blocks(self._teacher)):
            block.maps = None


class Rounded(Taught):
    """The same, with the tables rounded wherever they are read; in the end they stay so."""

    def begin(self, model: Recommender) -> None:
        super().begin(model)
        self._open = ExitStack()
        self._open.enter_context(aware(model, dict.fromkeys(TABLES, TABLE_GRID)))

    def end(self, model: Recommender) -> None:
        self._open.close()
        super().end(model)


def _taken(network: Recommender) -> tuple[list[Tensor], list[Tensor]]:
    """Maps [B, 1, T, S] by layer of the latest forward pass: of events, and of candidates."""
    found = []
    for block in _blocks(network):
        assert block.maps is not None
        found.append([one[:, None] for one in block.maps])
    return [events for events, _ in found], [candidates for _, candidates in found]


def _blocks(network: Recommender) -> list[Block]:
    return [block for block in network.blocks if isinstance(block, Block)]
