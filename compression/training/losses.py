"""Both losses of a batch of windows, and the lesson's; each window's last event is a target only.

What is drawn for a batch (which items stand in their bucket, where candidates compete, negatives) is drawn
for the whole of it, so that processes that share a batch draw alike. A target weighs what its behaviour is
worth (`goals`); means are over the whole batch's weights, so the shares' losses and gradients add up to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from compression.evaluation.predictors import Statistics
from compression.evaluation.scoring import row_categories, to_history
from compression.logs.dataset import before_last
from compression.training.group import ALONE, Group
from compression.training.lesson import Asked, Lesson
from compression.training.model import MASKED, History, Recommender
from features.encoding import HistoryArrays, Vocabulary

if TYPE_CHECKING:
    from compression.training.train import Recipe

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """A batch of B windows of up to L events before their last, and all that is drawn for it.

    history [B, L]: as the network sees it, some items as their bucket; targets [B, L]: what came next;
    weights [B, L]: of these in the retrieval loss, 0 where nothing is learnt; turn [B, P]: where candidates
    compete; candidates [B, P, C]: their rows, the target first; ranking_weights [B, P]: of these; vectors
    [B, P * C]: the rows that candidates are shown as; negatives [N]: None with a full softmax.
    """

    history: HistoryArrays
    targets: Int64
    weights: Float32
    turn: Int64
    candidates: Int64
    ranking_weights: Float32
    vectors: Int64
    negatives: Int64 | None


class Losses:
    """Retrieval and ranking loss of batches, and the lesson's. Draws from `rng`."""

    own, near, popular, any_item = 4, 4, 6, 4

    def __init__(
        self,
        vocabulary: Vocabulary,
        statistics: Statistics,
        recipe: Recipe,
        rng: np.random.Generator,
        lesson: Lesson,
        group: Group = ALONE,
    ) -> None:
        self._recipe, self._rng, self._lesson, self._group = recipe, rng, lesson, group
        self._device = group.device
        self._worth = recipe.goals.by_row()
        # One process whose targets all weigh 1 takes the plain mean: to the bit what it was before goals.
        self._plain = recipe.goals.alike and group.size == 1
        self._known = len(vocabulary.item_ids)
        self._categories = row_categories(vocabulary)
        self._category_rows = self._on(self._categories)
        self._bucket_of = np.arange(vocabulary.item_rows)
        self._bucket_of[1 : self._known + 1] = vocabulary.bucket_rows_of(vocabulary.item_ids)
        counts = statistics.counts[1:].astype(np.float64)
        popularity = counts**0.75 / max(1.0, (counts**0.75).sum())
        self._popular = np.cumsum(popularity)
        # Items the training part lacks are never negatives: they would only learn to be unlikely.
        self._trained = 1 + np.flatnonzero(counts)
        self._place = np.full(vocabulary.item_rows, -1)
        self._place[self._trained] = np.arange(len(self._trained))
        self._by_category = self._trained[np.argsort(self._categories[self._trained], kind="stable")]
        self._category_starts = np.searchsorted(
            self._categories[self._by_category], np.arange(vocabulary.category_rows + 1)
        )
        self._chance = 0.5 * popularity + np.where(counts > 0, 0.5 / len(self._trained), 0.0)
        self._log_expected = self._on(
            np.log(np.concatenate([[1.0], np.maximum(self._chance, 1e-12)]) * recipe.negatives)
        ).float()

    @property
    def full_softmax(self) -> bool:
        """Over every item that is trained, so that a step touches all of them."""
        return len(self._trained) <= self._recipe.full_softmax_items

    def draw(self, windows: HistoryArrays) -> Drawn:
        """Of a batch, alike in every process whose generator stands alike."""
        rng = self._rng
        targets = windows.items[:, 1:].astype(np.int64)
        stands_in = rng.random(len(self._bucket_of)) < self._recipe.item_dropout
        shown = np.where(stands_in, self._bucket_of, np.arange(len(self._bucket_of)))
        seen = before_last(windows)
        events = seen.lengths.astype(np.int64)
        history = replace(seen, items=shown[seen.items].astype(np.int32))
        inside = np.arange(targets.shape[1]) < events[:, None]
        worth = self._worth[windows.behaviors[:, 1:]]
        turn, candidates = self._candidates(seen.items, targets, events)
        negatives = None
        if not self.full_softmax:
            half = self._recipe.negatives // 2
            negatives = np.concatenate([self._draw_popular(half), self._draw(half)])
        return Drawn(
            history=history,
            targets=targets,
            weights=np.where(inside & (targets <= self._known), worth, np.float32(0)),
            turn=turn,
            candidates=candidates,
            ranking_weights=np.where(
                candidates[:, :, 0] <= self._known, np.take_along_axis(worth, turn, axis=1), np.float32(0)
            ),
            vectors=shown[candidates.reshape(len(candidates), -1)],
            negatives=negatives,
        )

    def touched(self, drawn: Drawn) -> Int64:
        """The rows of the item table, ascending, that a step on the whole batch changes."""
        known = [] if drawn.negatives is None else [drawn.targets[drawn.weights > 0], drawn.negatives]
        rows = np.unique(np.concatenate([drawn.history.items.ravel(), drawn.vectors.ravel(), *known]))
        return rows[rows > 0]

    def __call__(self, model: Recommender, drawn: Drawn) -> tuple[Tensor, Tensor, Tensor]:
        """This process's part of the batch's mean losses, retrieval's and ranking's: all of them where it is
        alone, and then the lesson's, too."""
        mine = self._group.share
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._recipe.precision == "bf16"):
            candidates = drawn.candidates[mine]
            count = candidates.shape[2]
            history = self._history(drawn.history, mine)
            rows = self._on(drawn.vectors[mine])
            categories = self._on(self._categories[candidates.reshape(rows.shape)])
            vectors = model.item_vectors(rows, categories)
            seen = self._on(np.repeat(drawn.turn[mine] + 1, count, axis=1))
            user_vectors, states = model(history, vectors, seen)
            learnt = self._on(drawn.weights[mine] > 0)
            targets = self._on(drawn.targets[mine])[learnt]
            logits, labels = self._retrieval(model, user_vectors[learnt], targets, drawn.negatives)
            retrieval = self._mean(logits, labels, drawn.weights)
            turn = self._on(drawn.turn[mine])
            at = turn[..., None].expand(-1, -1, user_vectors.shape[-1])
            asking = user_vectors.gather(1, at).repeat_interleave(count, dim=1)
            scores = model.readout_scores(states, vectors, asking)
            inside = self._on(np.arange(drawn.targets.shape[1]) < drawn.history.lengths[mine, None])
            asked = Asked(history, rows, categories, seen, turn, inside, self._known, self._category_rows)
            taught = self._lesson.loss(model, asked, user_vectors, scores)
            return retrieval, self._ranking(scores, candidates, drawn.ranking_weights), taught

    def _mean(self, logits: Tensor, labels: Tensor, weights: Float32) -> Tensor:
        """Cross-entropy of this process's targets [n, classes], in f32, as its part of the mean by the
        whole batch's `weights`."""
        if self._plain:
            return F.cross_entropy(logits.float(), labels)
        ours = weights[self._group.share]
        each = F.cross_entropy(logits.float(), labels, reduction="none")
        total = float(weights.sum(dtype=np.float64))
        return (each * self._on(ours[ours > 0])).sum() / max(total, 1e-12)

    def _retrieval(
        self, model: Recommender, user_vectors: Tensor, targets: Tensor, negatives: Int64 | None
    ) -> tuple[Tensor, Tensor]:
        """Logits over the catalogue, or of the target before the negatives; and the target's place."""
        if negatives is None:
            rows = self._on(self._trained)
            table = model.item_vectors(rows, self._category_rows[rows])
            return user_vectors @ table.T, self._on(self._place)[targets]
        others_rows = self._on(negatives)
        rows = torch.cat([targets, others_rows])
        table = model.item_vectors(rows, self._category_rows[rows])
        corrected = self._log_expected[rows]
        own = (user_vectors * table[: len(targets)]).sum(-1, keepdim=True)
        others = user_vectors @ table[len(targets) :].T - corrected[len(targets) :]
        others = others.masked_fill(targets[:, None] == others_rows, MASKED)
        logits = torch.cat([own - corrected[: len(targets), None], others], dim=1)
        return logits, torch.zeros_like(targets)

    def _ranking(self, scores: Tensor, candidates: Int64, weights: Float32) -> Tensor:
        """The loss of scores [B, P C]; a candidate that is the target once more is none."""
        users, positions, count = candidates.shape
        repeats = self._on(candidates == candidates[:, :, :1]).view(users * positions, count)
        repeats[:, 0] = False
        learnt = self._on(weights[self._group.share] > 0).view(-1)
        scores = scores.view(users * positions, count).masked_fill(repeats, MASKED)[learnt]
        return self._mean(scores, torch.zeros(len(scores), dtype=torch.long, device=self._device), weights)

    def _candidates(self, items: npt.NDArray[np.int32], targets: Int64, events: Int64) -> tuple[Int64, Int64]:
        """Where candidates compete [B, P], and their rows [B, P, C], the item that came next first."""
        rng, users, positions = self._rng, len(items), self._recipe.ranking_positions
        turn = (rng.random((users, positions)) * events[:, None]).astype(np.int64)
        at = np.arange(users)[:, None]
        next_item = targets[at, turn]
        earlier = (rng.random((users, positions, self.own)) * (turn + 1)[..., None]).astype(np.int64)
        own = items[at[..., None], earlier]
        near = self._draw_like(self._categories[next_item])
        popular = self._draw_popular(users * positions * self.popular).reshape(users, positions, -1)
        rest = self._draw(users * positions * self.any_item).reshape(users, positions, -1)
        return turn, np.concatenate([next_item[..., None], own, near, popular, rest], axis=2)

    def _draw_popular(self, count: int) -> Int64:
        drawn = 1 + np.searchsorted(self._popular, self._rng.random(count) * self._popular[-1])
        return np.asarray(np.minimum(drawn, self._known), np.int64)

    def _draw(self, count: int) -> Int64:
        return self._trained[self._rng.integers(0, len(self._trained), count)]

    def _draw_like(self, categories: npt.NDArray[np.int32]) -> Int64:
        """Items of each category row [...], `near` of each; any item where the category has none."""
        start, end = self._category_starts[categories], self._category_starts[categories + 1]
        start, end = np.where(end > start, start, 0), np.where(end > start, end, len(self._trained))
        chance = self._rng.random((*categories.shape, self.near))
        return np.asarray(
            self._by_category[start[..., None] + (chance * (end - start)[..., None]).astype(np.int64)],
            np.int64,
        )

    def _history(self, history: HistoryArrays, mine: slice) -> History:
        ours = HistoryArrays(**{name: rows[mine] for name, rows in history.tensors().items()})
        return History(*(tensor.to(self._device) for tensor in to_history(ours)))

    def _on(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device)
