"""Training: every event of a window predicts the next one, and at a few of them candidates compete.

Retrieval loss: softmax over the whole catalogue while it is small, over negatives shared by the batch
(with the logQ correction) beyond. Ranking loss: the item that came next against the user's own earlier
items, its category, popular and any items; candidates see the history up to their position only.
Some items of each batch stand in their hash bucket, so that buckets mean something when an item the
vocabulary lacks turns up.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from compression.evaluation.evaluate import (
    Targets,
    among_candidates,
    draw_candidates,
    full_catalogue,
    histories_before,
    metrics,
)
from compression.evaluation.predictors import Statistics
from compression.evaluation.scoring import TorchScorer, row_categories, to_history
from compression.logs.dataset import Sequences, Split, batches, training_windows
from compression.releases.registry import ModelShape
from compression.smaller.plan import NONE, Compression
from compression.training.checkpoint import Checkpoints, Standing, repeatable
from compression.training.lesson import Asked, Lesson
from compression.training.model import MASKED, Recommender
from features.encoding import HistoryArrays, Vocabulary, encode_histories

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how hard to train. Sizes of the network stand here too, and what is made smaller
    afterwards."""

    dim: int = 64
    layers: int = 2
    heads: int = 1
    ffn: int = 128
    max_history: int = 100
    max_items: int = 500_000
    item_buckets: int = 1024
    category_buckets: int = 64
    epochs: int = 30
    max_minutes: float = 60.0
    patience: int = 4
    batch_windows: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    dropout: float = 0.1
    item_dropout: float = 0.1
    full_softmax_items: int = 20_000
    negatives: int = 2_048
    ranking_positions: int = 4
    ranking_weight: float = 0.5
    judge_limit: int = 2_000
    compression: Compression = NONE

    def shape(self, vocabulary: Vocabulary) -> ModelShape:
        """Of the network that is trained for these items."""
        return ModelShape(
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            ffn=self.ffn,
            max_history=self.max_history,
            item_rows=vocabulary.item_rows,
            category_rows=vocabulary.category_rows,
        )


LAPTOP: Final = Recipe(
    epochs=20,
    max_minutes=1.0,
    full_softmax_items=2_000,
    negatives=1_024,
    ranking_positions=2,
    judge_limit=1_000,
    batch_windows=32,
    learning_rate=2e-3,
)
TINY: Final = Recipe(dim=32, ffn=64, layers=1, epochs=3, max_minutes=0.5, batch_windows=32, judge_limit=500)
RECIPES: Final = {"laptop": LAPTOP, "tiny": TINY, "full": Recipe()}


@dataclass(frozen=True, slots=True)
class Epoch:
    """One pass over the training windows, and how good the model was after it."""

    number: int
    retrieval_loss: float
    ranking_loss: float
    retrieval_ndcg: float
    ranking_ndcg: float
    seconds: float

    @property
    def judged(self) -> float:
        return self.retrieval_ndcg + self.ranking_ndcg


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """The best model by validation, in evaluation mode, and how it got there."""

    model: Recommender
    epochs: list[Epoch]
    best: int
    stopped: str


@repeatable()
def train(
    sequences: Sequences,
    split: Split,
    vocabulary: Vocabulary,
    recipe: Recipe,
    *,
    seed: int = 1,
    progress: Callable[[float, str], None] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    checkpoints: Checkpoints | None = None,
    lesson: Lesson | None = None,
) -> Trained:
    """Train until the epochs or the minutes are spent, or validation NDCG no longer rises. Starts from
    `weights` where they are given; goes on where `checkpoints` left off; learns a `lesson` beside."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Recommender(recipe.shape(vocabulary), recipe.dropout)
    if weights is not None:
        model.load_state_dict(weights)
    lesson = lesson or Lesson()
    lesson.begin(model)
    statistics = Statistics(sequences, split, vocabulary)
    judge = _Judge(sequences, split, vocabulary, statistics, recipe)
    losses = _Losses(vocabulary, statistics, recipe, rng, lesson)
    optimizer = torch.optim.AdamW(_parameter_groups(model, recipe), lr=recipe.learning_rate, fused=True)
    at = checkpoints.restore(model, optimizer) if checkpoints else Standing()
    best_weights = at.kept.setdefault("best", copy.deepcopy(model.state_dict()))
    done, stopped = [Epoch(**epoch) for epoch in at.done], "epochs"
    started = time.monotonic() - at.seconds
    deadline = started + 60 * recipe.max_minutes
    for number in range(at.epoch, recipe.epochs):
        model.train()
        at.begin_epoch(rng)
        starts, ends = training_windows(sequences, split.train_ends, recipe.max_history, rng)
        order = list(batches(starts, ends, recipe.batch_windows, rng))
        if checkpoints:
            checkpoints.resume_rng(rng)
        for batch_starts, batch_ends in order[at.step :]:
            length = int((batch_ends - batch_starts).max())
            windows = encode_histories(sequences.windows(batch_starts, batch_ends), vocabulary, length)
            retrieval, ranking, taught = losses(model, windows)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(retrieval + recipe.ranking_weight * ranking + taught)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            at.sums = [at.sums[0] + float(retrieval.detach()), at.sums[1] + float(ranking.detach())]
            at.step += 1
            at.seconds = time.monotonic() - started
            if checkpoints:
                checkpoints.offer(model, optimizer, rng, at)
            if progress:
                by_epochs = (number + at.step / len(order)) / recipe.epochs
                by_time = at.seconds / (deadline - started)
                progress(min(1.0, max(by_epochs, by_time)), f"epoch {number + 1}")
            if time.monotonic() > deadline:
                break
        retrieval_ndcg, ranking_ndcg = judge(model)
        done.append(
            Epoch(
                number + 1,
                round(at.sums[0] / max(1, at.step), 4),
                round(at.sums[1] / max(1, at.step), 4),
                retrieval_ndcg,
                ranking_ndcg,
                round(time.monotonic() - started, 1),
            )
        )
        at.done.append(asdict(done[-1]))
        at.end_epoch()
        if at.best < 0 or done[-1].judged > done[at.best].judged:
            at.best, best_weights = number, copy.deepcopy(model.state_dict())
            at.kept["best"] = best_weights
        if time.monotonic() > deadline:
            stopped = "time"
            break
        if number - at.best >= recipe.patience:
            stopped = "validation"
            break
    model.load_state_dict(best_weights)
    lesson.end(model)
    return Trained(model.eval(), done, at.best + 1, stopped)


class _Judge:
    """Validation NDCG@10 of both heads, on the same targets and candidates every time."""

    def __init__(
        self,
        sequences: Sequences,
        split: Split,
        vocabulary: Vocabulary,
        statistics: Statistics,
        recipe: Recipe,
    ) -> None:
        self._vocabulary = vocabulary
        self._histories = histories_before(sequences, vocabulary, recipe.max_history)
        self._targets = Targets.draw(
            sequences, split.validation, vocabulary, limit=recipe.judge_limit, seed=3
        )
        self._candidates = draw_candidates(sequences, self._targets, statistics, vocabulary, seed=3)
        self._categories = row_categories(vocabulary)

    def __call__(self, model: Recommender) -> tuple[float, float]:
        model.eval()
        scorer = TorchScorer(model, self._categories)
        retrieval = full_catalogue(scorer, self._histories, self._targets, len(self._vocabulary.item_ids))
        ranking = among_candidates(scorer, self._histories, self._targets, self._vocabulary, self._candidates)
        return metrics(retrieval, (10,))["ndcg@10"], metrics(ranking, (10,))["ndcg@10"]


class _Losses:
    """Both losses of a batch of windows, and the lesson's; each window's last event is a target only."""

    own, near, popular, any_item = 4, 4, 6, 4

    def __init__(
        self,
        vocabulary: Vocabulary,
        statistics: Statistics,
        recipe: Recipe,
        rng: np.random.Generator,
        lesson: Lesson,
    ) -> None:
        self._recipe, self._rng, self._lesson = recipe, rng, lesson
        self._known = len(vocabulary.item_ids)
        self._categories = row_categories(vocabulary)
        self._category_rows = torch.from_numpy(self._categories)
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
        self._log_expected = torch.from_numpy(
            np.log(np.concatenate([[1.0], np.maximum(self._chance, 1e-12)]) * recipe.negatives)
        ).float()

    def __call__(self, model: Recommender, windows: HistoryArrays) -> tuple[Tensor, Tensor, Tensor]:
        rng = self._rng
        targets = windows.items[:, 1:].astype(np.int64)
        events = np.maximum(windows.lengths - 1, 0)
        stands_in = rng.random(len(self._bucket_of)) < self._recipe.item_dropout
        shown = np.where(stands_in, self._bucket_of, np.arange(len(self._bucket_of)))
        history = to_history(
            HistoryArrays(
                items=shown[windows.items[:, :-1]].astype(np.int32),
                categories=windows.categories[:, :-1],
                behaviors=windows.behaviors[:, :-1],
                gaps=windows.gaps[:, :-1],
                lengths=events.astype(np.int32),
            )
        )
        inside = np.arange(targets.shape[1]) < events[:, None]
        turn, candidates = self._candidates(windows.items[:, :-1], targets, events)
        flat = candidates.reshape(len(candidates), -1)
        rows, categories = torch.from_numpy(shown[flat]), torch.from_numpy(self._categories[flat])
        vectors = model.item_vectors(rows, categories)
        seen = torch.from_numpy(np.repeat(turn + 1, candidates.shape[2], axis=1))
        user_vectors, states = model(history, vectors, seen)
        learnable = torch.from_numpy(inside & (targets <= self._known))
        retrieval = self._retrieval(model, user_vectors[learnable], torch.from_numpy(targets)[learnable])
        at = torch.from_numpy(turn)[..., None].expand(-1, -1, user_vectors.shape[-1])
        asking = user_vectors.gather(1, at).repeat_interleave(candidates.shape[2], dim=1)
        scores = model.readout_scores(states, vectors, asking)
        asked = Asked(
            history,
            rows,
            categories,
            seen,
            torch.from_numpy(turn),
            torch.from_numpy(inside),
            self._known,
            self._category_rows,
        )
        taught = self._lesson.loss(model, asked, user_vectors, scores)
        return retrieval, self._ranking(scores, candidates), taught

    def _retrieval(self, model: Recommender, user_vectors: Tensor, targets: Tensor) -> Tensor:
        if len(self._trained) <= self._recipe.full_softmax_items:
            rows = torch.from_numpy(self._trained)
            table = model.item_vectors(rows, self._category_rows[rows])
            return F.cross_entropy(user_vectors @ table.T, torch.from_numpy(self._place)[targets])
        count = self._recipe.negatives
        negatives = torch.from_numpy(np.concatenate([self._draw_popular(count // 2), self._draw(count // 2)]))
        rows = torch.cat([targets, negatives])
        table = model.item_vectors(rows, self._category_rows[rows])
        corrected = self._log_expected[rows]
        own = (user_vectors * table[: len(targets)]).sum(-1, keepdim=True)
        others = user_vectors @ table[len(targets) :].T - corrected[len(targets) :]
        others = others.masked_fill(targets[:, None] == negatives, MASKED)
        logits = torch.cat([own - corrected[: len(targets), None], others], dim=1)
        return F.cross_entropy(logits, torch.zeros_like(targets))

    def _ranking(self, scores: Tensor, candidates: Int64) -> Tensor:
        users, positions, count = candidates.shape
        scores = scores.view(users * positions, count)
        repeats = torch.from_numpy(candidates == candidates[:, :, :1]).view(users * positions, count)
        repeats[:, 0] = False
        known = torch.from_numpy(candidates[:, :, 0] <= self._known).view(-1)
        scores = scores.masked_fill(repeats, MASKED)[known]
        return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))

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


def _parameter_groups(model: Recommender, recipe: Recipe) -> list[dict[str, object]]:
    matrices = [p for n, p in model.named_parameters() if n.startswith(("blocks", "readout")) and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
