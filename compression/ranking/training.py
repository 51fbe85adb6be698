"""Training and judging a `CandidateRanker`, alone or by a teacher, for a number of minutes.

Every event of a window predicts the next one over the catalogue, and at a few of them the item that came
next competes with others as candidates. A student sees the same windows and candidates as its teacher.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
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
from compression.evaluation.scoring import to_history
from compression.logs.dataset import Sequences, Split, batches, training_windows
from compression.ranking.network import CandidateRanker
from compression.retrieval.losses import Negatives, shared_negatives
from compression.retrieval.network import RetrievalNetwork
from compression.smaller.distil import maps_divergence, opinion_divergence
from compression.training.model import MASKED, History
from features.encoding import HistoryArrays, Vocabulary, encode_histories

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
OWN = 5  # of a target's rivals are the user's own earlier items


@dataclass(frozen=True, slots=True)
class Effort:
    """How long and how hard. `maps` and `opinions` weigh what a teacher says beside the log itself."""

    minutes: float = 1.0
    max_steps: int = 10**9
    learning_rate: float = 1e-3
    batch_windows: int = 32
    positions: int = 2
    rivals: int = 15
    negatives: int = 1_024
    maps: float = 0.1
    opinions: float = 1.0


class Data:
    """A log, encoded: what is learned from and what is judged by."""

    def __init__(
        self, sequences: Sequences, split: Split, vocabulary: Vocabulary, *, judged: int = 1_000
    ) -> None:
        self.sequences, self.split, self.vocabulary = sequences, split, vocabulary
        self.statistics = Statistics(sequences, split, vocabulary)
        self.known = self.statistics.known_items
        self.targets = Targets.draw(sequences, split.test, vocabulary, limit=judged, seed=7)
        self.candidates = draw_candidates(sequences, self.targets, self.statistics, vocabulary, seed=7)

    def judge_retrieval(self, network: RetrievalNetwork) -> dict[str, float]:
        """HR, NDCG and MRR over the catalogue."""
        network.eval()
        histories = histories_before(self.sequences, self.vocabulary, network.config.max_history)
        return metrics(full_catalogue(_Scorer(network), histories, self.targets, self.known), (10, 50))

    def judge(self, ranker: CandidateRanker) -> dict[str, float]:
        """HR, NDCG and MRR over the catalogue (hr@50 …) and within fifty candidates (within_hr@10 …)."""
        ranker.eval()
        scorer = _RankingScorer(ranker)
        histories = histories_before(self.sequences, self.vocabulary, ranker.network.config.max_history - 1)
        over = metrics(full_catalogue(scorer, histories, self.targets, self.known), (10, 50))
        within = among_candidates(scorer, histories, self.targets, self.vocabulary, self.candidates)
        return over | {f"within_{name}": value for name, value in metrics(within, (10,)).items()}


def fit(
    ranker: CandidateRanker,
    data: Data,
    effort: Effort,
    *,
    teacher: CandidateRanker | None = None,
    after_step: Callable[[], None] = lambda: None,
    seed: int = 1,
) -> int:
    """Train a ranker, by a teacher where there is one; the steps that were taken."""
    rng = np.random.default_rng(seed)
    losses = _Losses(data, effort, rng)
    if teacher is not None:
        teacher.eval()
        _keep_maps(teacher, True)
        _keep_maps(ranker, True)
    steps = descend(
        ranker,
        lambda windows: losses(ranker, windows, teacher),
        data,
        effort,
        length=ranker.network.config.max_history - 1,
        after_step=after_step,
        rng=rng,
    )
    if teacher is not None:
        _keep_maps(ranker, False)
    return steps


def fit_retrieval(network: RetrievalNetwork, data: Data, effort: Effort, *, seed: int = 1) -> int:
    """Train a network for the catalogue alone, whatever its attention; the steps that were taken."""
    rng = np.random.default_rng(seed)
    negatives = Negatives(data.statistics.counts[1:].astype(np.int64), effort.negatives)

    def loss(windows: HistoryArrays) -> Tensor:
        history, targets, inside, _ = _asked(windows, data.known)
        table = network.items.weight[1 : data.known + 1]
        rows = torch.from_numpy(targets)[inside] - 1
        drawn = negatives.draw(rng)
        return shared_negatives(network(history)[inside], table, rows, drawn, negatives.log_expected)

    return descend(network, loss, data, effort, length=network.config.max_history, rng=rng)


def descend(
    model: nn.Module,
    loss_of: Callable[[HistoryArrays], Tensor],
    data: Data,
    effort: Effort,
    *,
    length: int,
    rng: np.random.Generator,
    after_step: Callable[[], None] = lambda: None,
) -> int:
    """Train until the minutes are spent, windows again and again in new order; the steps that were taken.
    In the second half the learning rate falls to a tenth."""
    torch.manual_seed(int(rng.integers(2**62)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=effort.learning_rate, weight_decay=0.0, fused=True)
    model.train()
    began, steps, done = time.process_time(), 0, 0.0
    while done < 1.0:
        starts, ends = training_windows(data.sequences, data.split.train_ends, length, rng)
        for batch_starts, batch_ends in batches(starts, ends, effort.batch_windows, rng):
            for group in optimizer.param_groups:
                group["lr"] = effort.learning_rate * min(1.0, 1.9 - 1.8 * done)
            width = int((batch_ends - batch_starts).max())
            windows = encode_histories(
                data.sequences.windows(batch_starts, batch_ends), data.vocabulary, width
            )
            loss = loss_of(windows)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            after_step()
            steps += 1
            # By processor time: a training that others push aside gets the same work done.
            done = max((time.process_time() - began) / (60 * effort.minutes), steps / effort.max_steps)
            if done >= 1.0:
                break
    model.eval()
    return steps


def _asked(windows: HistoryArrays, known: int) -> tuple[History, Int64, Tensor, Int64]:
    """Windows without their last event, which is a target only; targets [B, L], which of these can be
    learned, and how many events each window has left."""
    events = np.maximum(windows.lengths - 1, 0).astype(np.int64)
    history = HistoryArrays(
        items=windows.items[:, :-1],
        categories=windows.categories[:, :-1],
        behaviors=windows.behaviors[:, :-1],
        gaps=windows.gaps[:, :-1],
        lengths=events.astype(np.int32),
    )
    targets = windows.items[:, 1:].astype(np.int64)
    inside = (np.arange(targets.shape[1]) < events[:, None]) & (targets <= known)
    return to_history(history), targets, torch.from_numpy(inside), events


class _Losses:
    """Catalogue and candidates of a batch of windows, and what the teacher says of both."""

    def __init__(self, data: Data, effort: Effort, rng: np.random.Generator) -> None:
        self._effort, self._rng, self._known = effort, rng, data.known
        self._negatives = Negatives(data.statistics.counts[1:].astype(np.int64), effort.negatives)

    def __call__(
        self, ranker: CandidateRanker, windows: HistoryArrays, teacher: CandidateRanker | None
    ) -> Tensor:
        history, targets, inside, events = _asked(windows, self._known)
        candidates, seen = self._candidates(windows.items[:, :-1], targets, events)
        flat = candidates.flatten(1)
        turns = seen[..., None].expand_as(candidates).flatten(1)
        users, scores, maps = ranker(history, flat, turns)
        drawn = self._negatives.draw(self._rng)
        rows = torch.from_numpy(targets)[inside]
        asked = users[inside]
        table = ranker.network.items.weight[1 : self._known + 1]
        loss = shared_negatives(asked, table, rows - 1, drawn, self._negatives.log_expected)
        scores = _without_repeats(scores.view(candidates.shape), candidates)
        loss = loss + F.cross_entropy(
            scores.flatten(0, 1), torch.zeros(scores.shape[:2].numel(), dtype=torch.long)
        )
        if teacher is None:
            return loss
        with torch.no_grad():
            their_users, their_scores, their_maps = teacher(history, flat, turns)
            their_table = teacher.network.items.weight
            their_scores = _without_repeats(their_scores.view(candidates.shape), candidates)
            their_opinion = their_users[inside] @ their_table[drawn + 1].T
        opinion = asked @ table[drawn].T
        said = opinion_divergence(opinion, their_opinion)
        said = said + opinion_divergence(scores.flatten(0, 1), their_scores.flatten(0, 1))
        there = torch.cat([inside, torch.ones_like(flat, dtype=torch.bool)], 1).float()
        copied = maps_divergence(cast(list[Tensor], maps), cast(list[Tensor], their_maps), there)
        return loss + self._effort.opinions * said + self._effort.maps * copied

    def _candidates(
        self, items: Int32, targets: Int64, events: npt.NDArray[np.integer]
    ) -> tuple[Tensor, Tensor]:
        """Rows [B, P, 1 + rivals], the item that came next first, and after how many events [B, P]."""
        rng, effort = self._rng, self._effort
        users = len(items)
        turn = (rng.random((users, effort.positions)) * events[:, None]).astype(np.int64)
        at = np.arange(users)[:, None]
        own = (rng.random((users, effort.positions, OWN)) * (turn + 1)[..., None]).astype(np.int64)
        count = effort.rivals - OWN
        others = self._negatives.draw(rng)[
            torch.from_numpy(rng.integers(0, effort.negatives, (users, effort.positions, count)))
        ]
        chosen = np.concatenate(
            [targets[at, turn][..., None], items[at[..., None], own], others.numpy() + 1], axis=2
        )
        return torch.from_numpy(chosen.astype(np.int64)), torch.from_numpy(turn + 1)


def _without_repeats(scores: Tensor, candidates: Tensor) -> Tensor:
    """Rivals that are the target itself are no rivals."""
    same = candidates == candidates[..., :1]
    same[..., 0] = False
    return scores.masked_fill(same, MASKED)


def _keep_maps(ranker: CandidateRanker, keep: bool) -> None:
    for layer in ranker.layers:
        layer.attention.keep_map = keep


class _Scorer:
    """A network as evaluation over the catalogue sees it."""

    def __init__(self, network: RetrievalNetwork) -> None:
        self._network = network

    def item_table(self) -> Float32:
        table: Float32 = self._network.items.weight.detach().numpy()
        return table

    def user_vectors(self, histories: HistoryArrays) -> Float32:
        with torch.inference_mode():
            vectors: Float32 = self._network.user_vectors(_at_least_one(to_history(histories))).numpy()
        return vectors

    def rank(self, histories: HistoryArrays, candidates: Int32, categories: Int32) -> Float32:
        raise TypeError("a network without a ranker scores no candidates")


class _RankingScorer(_Scorer):
    """A ranker as evaluation sees it."""

    def __init__(self, ranker: CandidateRanker) -> None:
        super().__init__(ranker.network)
        self._ranker = ranker

    def rank(self, histories: HistoryArrays, candidates: Int32, categories: Int32) -> Float32:
        history = _at_least_one(to_history(histories))
        seen = history.lengths[:, None].expand(-1, candidates.shape[1])
        with torch.inference_mode():
            scores: Float32 = self._ranker(history, torch.from_numpy(candidates).long(), seen)[1].numpy()
        return scores


def _at_least_one(history: History) -> History:
    """A user without events has seen the padding item."""
    return history._replace(lengths=history.lengths.clamp(min=1))
