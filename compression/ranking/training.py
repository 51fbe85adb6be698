"""Training a `CandidateRanker`, alone or by a teacher, for a number of passes over a log.

Every event of a window predicts the next one over the catalogue; in some of the steps the item that came
next at a few of them competes with others as candidates, too. A student sees the same windows and
candidates as its teacher. What is left in the end is a running mean of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compression.evaluation.scoring import to_history
from compression.logs.dataset import before_last
from compression.ranking.descent import Effort, descend
from compression.ranking.judging import Data
from compression.ranking.losses import taught_softmax
from compression.ranking.network import CandidateRanker
from compression.ranking.opinions import MOST_BYTES, KeptStates
from compression.retrieval.losses import Negatives, full_softmax, shared_negatives
from compression.retrieval.network import RetrievalNetwork
from compression.retrieval.step import multiplies_bf16
from compression.smaller.distil import maps_divergence, opinion_divergence
from compression.training.checkpoint import Checkpoints
from compression.training.model import MASKED, History
from features.encoding import HistoryArrays

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
LISTED = 128  # items of a teacher that are compared one by one
OWN = 5  # of a target's rivals are the user's own earlier items


def fit(
    ranker: CandidateRanker,
    data: Data,
    effort: Effort,
    *,
    teacher: CandidateRanker | None = None,
    beside: Sequence[CandidateRanker] = (),
    after_step: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda taken, last: None,
    seed: int = 1,
    checkpoints: Checkpoints | None = None,
) -> int:
    """Train a ranker, by a teacher where there is one; the steps that were taken. Teachers `beside` it say
    what they think, too: the mean of all logits counts; where to look is said by the first alone. With
    `checkpoints` a training that was killed goes on, and one that is whole is not taken again. After every
    step `progress` is told its number and that of the last."""
    rng = np.random.default_rng(seed)
    loss = _Losses(data, effort, rng, () if teacher is None else (teacher, *beside))
    if teacher is not None:
        for one in (teacher, *beside):
            one.eval()
        _keep_maps(teacher, True)
        _keep_maps(ranker, True)
    steps = descend(
        ranker,
        lambda windows, step: loss(ranker, windows, step),
        data,
        effort,
        length=ranker.network.config.max_history - 1,
        after_step=after_step,
        progress=progress,
        rng=rng,
        checkpoints=checkpoints,
        by_rows=_by_rows(ranker.network, data, effort),
    )
    if teacher is not None:
        _keep_maps(ranker, False)
    return steps


def fit_retrieval(network: RetrievalNetwork, data: Data, effort: Effort, *, seed: int = 1) -> int:
    """Train a network for the catalogue alone, whatever its attention; the steps that were taken."""
    rng = np.random.default_rng(seed)
    catalogue = _Catalogue(data, effort, rng)

    def loss(windows: HistoryArrays, step: int) -> Tensor:
        history, targets, inside, _ = _asked(windows, data.known)
        with _autocast(effort):
            users = network(history)
        return catalogue(network, users, targets, inside, None)

    length, by_rows = network.config.max_history, _by_rows(network, data, effort)
    return descend(network, loss, data, effort, length=length, rng=rng, by_rows=by_rows)


def _by_rows(network: RetrievalNetwork, data: Data, effort: Effort) -> nn.Embedding | None:
    """The table, where a step touches few of its rows."""
    return network.items if effort.samples(data.known) and isinstance(network.items, nn.Embedding) else None


def _autocast(effort: Effort) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=effort.bf16 and multiplies_bf16())


def _asked(windows: HistoryArrays, known: int) -> tuple[History, Int64, Tensor, Int64]:
    """Windows `before_last`; targets [B, L], which of these can be learned, and how many events each window
    has left."""
    history = before_last(windows)
    events = history.lengths.astype(np.int64)
    targets = windows.items[:, 1:].astype(np.int64)
    inside = (np.arange(targets.shape[1]) < events[:, None]) & (targets <= known)
    return to_history(history), targets, torch.from_numpy(inside), events


class _Catalogue:
    """How far user vectors are from the items that came next, and from a teacher's opinion of all items."""

    def __init__(
        self, data: Data, effort: Effort, rng: np.random.Generator, their_table: Tensor | None = None
    ) -> None:
        """`their_table` [rows, e]: the teachers' items, where there are any."""
        self._effort, self._rng = effort, rng
        self._rows = torch.arange(1, data.known + 1)
        self.low = torch.bfloat16 if effort.bf16 and multiplies_bf16() else torch.float32
        self._whole = not effort.samples(data.known)
        self._negatives = Negatives(data.statistics.counts[1:].astype(np.int64), effort.negatives)
        if their_table is not None:
            self._theirs = their_table[1 : data.known + 1]
            if effort.listed and not self._whole:
                self._theirs_low = self._theirs.to(self.low)

    def draw(self) -> Tensor:
        """Items (rows) that are rivals of any target."""
        return self._negatives.draw(self._rng) + 1

    def __call__(
        self,
        network: RetrievalNetwork,
        users: Tensor,
        targets: Int64,
        inside: Tensor,
        their_users: Tensor | None,
    ) -> Tensor:
        """`users` [B, L, d]; `their_users` [B, L, e]: the teachers'."""
        places = torch.from_numpy(targets)[inside] - 1
        asked = users[inside].float()
        known = None if their_users is None else their_users[inside].float()
        if self._whole:
            # Looked up, not sliced: a table that is being rounded is rounded here, too.
            table = network.items(self._rows)
            if known is None:
                return full_softmax(asked, table, places, low=self.low)
            taught = known, self._theirs
            return taught_softmax(asked, table, places, taught, share=self._effort.taught, low=self.low)
        drawn = self._negatives.draw(self._rng)
        wanted, found = torch.unique(torch.cat([places, drawn]), return_inverse=True)
        table = network.items(wanted + 1)
        own, others = found.split([len(places), len(drawn)])
        loss = shared_negatives(asked, table, own, others, self._negatives.log_expected[wanted])
        if known is None:
            return loss
        if self._effort.listed:
            said = self._lists(network, asked, known, drawn, table[others])
        else:
            said = opinion_divergence(asked @ table[others].T, known @ self._theirs[drawn].T)
        return loss + self._effort.opinions * said

    def _lists(
        self, network: RetrievalNetwork, asked: Tensor, known: Tensor, drawn: Tensor, rivals: Tensor
    ) -> Tensor:
        """How far some of the `asked` [N, d] are from a teacher's opinion of all items: what it (`known`
        [N, e]) would list is compared one by one, the rest by those `drawn` [S], whose rows are `rivals`
        [S, d] and which count the more the seldomer they are drawn (logQ)."""
        some = torch.from_numpy(self._rng.permutation(len(asked))[: self._effort.listed])
        asked, known = asked[some], known[some]
        with torch.no_grad():
            all_items = known.to(self.low) @ self._theirs_low.T
            theirs, places = all_items.float().topk(min(LISTED, len(self._rows)), -1)
            correction = self._negatives.log_expected[drawn]
            tail = known @ self._theirs[drawn].T - correction
            hidden = (places[:, :, None] == drawn).any(1)
        rows, found = torch.unique(places, return_inverse=True)
        listed = network.items(rows + 1)[found]
        ours = torch.cat([(listed @ asked[..., None])[..., 0], asked @ rivals.T - correction], 1)
        theirs = torch.cat([theirs, tail], 1)
        hidden = torch.cat([torch.zeros_like(places, dtype=torch.bool), hidden], 1)
        return opinion_divergence(ours.masked_fill(hidden, MASKED), theirs.masked_fill(hidden, MASKED))


class _Losses:
    """Catalogue and candidates of a batch of windows, and what teachers say of both."""

    def __init__(
        self,
        data: Data,
        effort: Effort,
        rng: np.random.Generator,
        teachers: Sequence[CandidateRanker],
    ) -> None:
        self._effort, self._rng, self._known = effort, rng, data.known
        self._teachers = teachers
        table = None
        if teachers:
            # Side by side, so that the product with user vectors side by side is the mean of all logits.
            tables = [one.network.items.weight.detach() for one in teachers]
            table = torch.cat(tables, 1).div_(len(tables))
        self._catalogue = _Catalogue(data, effort, rng, table)
        self._states = [
            KeptStates(one.network, self._catalogue.low, MOST_BYTES // len(teachers)) for one in teachers
        ]

    def __call__(self, ranker: CandidateRanker, windows: HistoryArrays, step: int) -> Tensor:
        history, targets, inside, events = _asked(windows, self._known)
        if step % self._effort.candidates_every:
            with _autocast(self._effort):
                users = ranker.network(history)
                theirs = None
                if self._teachers:
                    theirs = torch.cat([kept(history) for kept in self._states], 2)
            return self._catalogue(ranker.network, users, targets, inside, theirs)
        candidates, seen = self._candidates(windows.items[:, :-1], targets, events)
        flat = candidates.flatten(1)
        turns = seen[..., None].expand_as(candidates).flatten(1)
        with _autocast(self._effort):
            users, scores, maps = ranker(history, flat, turns)
        scores = _without_repeats(scores.float().view(candidates.shape), candidates).flatten(0, 1)
        first = torch.zeros(len(scores), dtype=torch.long)
        if not self._teachers:
            among = F.cross_entropy(scores, first)
            return self._catalogue(ranker.network, users, targets, inside, None) + among
        with torch.no_grad(), _autocast(self._effort):
            said = [teacher(history, flat, turns) for teacher in self._teachers]
        their_users, their_maps = torch.cat([one[0] for one in said], 2), said[0][2]
        their_scores = torch.stack([one[1].float() for one in said]).mean(0)
        theirs = _without_repeats(their_scores.view(candidates.shape), candidates).flatten(0, 1)
        loss = self._catalogue(ranker.network, users, targets, inside, their_users)
        among = F.cross_entropy(scores, first) + self._effort.opinions * opinion_divergence(scores, theirs)
        there = torch.cat([inside, torch.ones_like(flat, dtype=torch.bool)], 1).float()
        copied = maps_divergence(cast(list[Tensor], maps), cast(list[Tensor], their_maps), there)
        return loss + among + self._effort.maps * copied

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
        others = self._catalogue.draw()[
            torch.from_numpy(rng.integers(0, effort.negatives, (users, effort.positions, count)))
        ]
        chosen = np.concatenate(
            [targets[at, turn][..., None], items[at[..., None], own], others.numpy()], axis=2
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
