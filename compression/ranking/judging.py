"""How well a `CandidateRanker` foretells what came next: ranks over the catalogue and within fifty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from compression.errors import ArtefactInvalid
from compression.evaluation.among import among_candidates, draw_candidates
from compression.evaluation.catalogue import catalogue_ranks, retrieval_scores
from compression.evaluation.comparison import paired_bootstrap
from compression.evaluation.predictors import Statistics
from compression.evaluation.scoring import to_history
from compression.evaluation.targets import Targets, histories_before, metrics, ndcg_gains
from compression.files import write_whole
from compression.logs.dataset import Sequences, Split
from compression.ranking.network import CandidateRanker
from compression.retrieval.network import RetrievalNetwork
from compression.training.model import History
from features.encoding import HistoryArrays, Vocabulary

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

OVER: Final = ("hr@50", "ndcg@50", "mrr")
_USERS: Final = 16  # at a time: their maps stay in the cache
WITHIN: Final = ("within_hr@10", "within_ndcg@10", "within_mrr")


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """The rank of every target, 1 the best, over the catalogue and within its fifty candidates. [targets]"""

    over: Float64
    within: Float64

    def metrics(self) -> dict[str, float]:
        """hr@50 … over the catalogue, within_hr@10 … within fifty."""
        within = metrics(self.within, (10,))
        return metrics(self.over, (10, 50)) | {f"within_{name}": value for name, value in within.items()}

    def gains(self, name: str) -> Float64:
        """What each target adds to a figure's mean."""
        ranks = self.within if name.startswith("within_") else self.over
        kind, _, cut = name.removeprefix("within_").partition("@")
        if kind == "mrr":
            return np.asarray(1.0 / ranks)
        return np.asarray(ranks <= int(cut), np.float64) if kind == "hr" else ndcg_gains(ranks, int(cut))

    def save(self, path: Path) -> None:
        write_whole(path, np.stack([self.over, self.within]).astype("<f8").tobytes())

    @classmethod
    def load(cls, path: Path) -> Ranks:
        stored = np.frombuffer(path.read_bytes(), "<f8")
        if len(stored) % 2:
            raise ArtefactInvalid(f"{path.name} holds no two ranks per target")
        over, within = stored.reshape(2, -1)
        return cls(over, within)


def losses(ranks: Ranks, base: Ranks, names: Sequence[str] = (*OVER, *WITHIN)) -> dict[str, dict[str, float]]:
    """By figure the share of the base's that is lost, and its 95 % interval when users are drawn anew
    (paired bootstrap; below zero where the base is surpassed)."""
    found = {}
    for name in names:
        own, whole = ranks.gains(name), base.gains(name)
        mean = float(whole.mean())
        if not mean:
            continue
        low, high = paired_bootstrap(whole - own, np.arange(len(own)))
        lost = float((whole - own).mean())
        found[name] = {
            "loss": round(lost / mean, 5),
            "low": round(low / mean, 5),
            "high": round(high / mean, 5),
        }
    return found


class Data:
    """A log, encoded: what is learned from and what is judged by. `judged`: so many users at most;
    `filter_seen`: over the catalogue, what a user has had is not ranked."""

    def __init__(
        self,
        sequences: Sequences,
        split: Split,
        vocabulary: Vocabulary,
        *,
        judged: int = 10_000,
        filter_seen: bool = False,
        part: Literal["test", "validation"] = "test",
    ) -> None:
        self.sequences, self.split, self.vocabulary = sequences, split, vocabulary
        self.statistics = Statistics(sequences, split, vocabulary)
        self.known = self.statistics.known_items
        self._seen = self.statistics.seen if filter_seen else None
        positions = split.test if part == "test" else split.validation
        self.targets = Targets.draw(sequences, positions, vocabulary, limit=judged, seed=7)
        self.candidates = draw_candidates(sequences, self.targets, self.statistics, vocabulary, seed=7)

    def judge_retrieval(self, network: RetrievalNetwork) -> dict[str, float]:
        """HR, NDCG and MRR over the catalogue."""
        network.eval()
        return metrics(self._over(_Scorer(network), network.config.max_history), (10, 50))

    def ranks(self, ranker: CandidateRanker) -> Ranks:
        ranker.eval()
        scorer, length = _RankingScorer(ranker), ranker.network.config.max_history - 1
        histories = histories_before(self.sequences, self.vocabulary, length)
        within = among_candidates(scorer, histories, self.targets, self.vocabulary, self.candidates)
        return Ranks(self._over(scorer, length), within)

    def judge(self, ranker: CandidateRanker) -> dict[str, float]:
        """HR, NDCG and MRR over the catalogue (hr@50 …) and within fifty candidates (within_hr@10 …)."""
        return self.ranks(ranker).metrics()

    def _over(self, scorer: _Scorer, length: int) -> Float64:
        histories = histories_before(self.sequences, self.vocabulary, length)
        scores = retrieval_scores(scorer, histories, self.known)
        return catalogue_ranks(scores, self.targets, self.known, self._seen)


class _Scorer:
    """A network as evaluation over the catalogue sees it."""

    def __init__(self, network: RetrievalNetwork) -> None:
        self._network = network

    def item_table(self) -> Float32:
        table: Float32 = self._network.items.weight.detach().numpy()
        return table

    def user_vectors(self, histories: HistoryArrays) -> Float32:
        history = _at_least_one(to_history(histories))
        with torch.inference_mode():
            vectors = [self._network.user_vectors(some) for some in _parts(history)]
        return np.asarray(torch.cat(vectors))

    def rank(self, histories: HistoryArrays, candidates: Int32, categories: Int32) -> Float32:
        raise TypeError("a network without a ranker scores no candidates")


class _RankingScorer(_Scorer):
    """A ranker as evaluation sees it."""

    def __init__(self, ranker: CandidateRanker) -> None:
        super().__init__(ranker.network)
        self._ranker = ranker

    def rank(self, histories: HistoryArrays, candidates: Int32, categories: Int32) -> Float32:
        history, asked = _at_least_one(to_history(histories)), torch.from_numpy(candidates).long()
        with torch.inference_mode():
            scores = [
                self._ranker(some, one, some.lengths[:, None].expand_as(one))[1]
                for some, one in zip(_parts(history), torch.split(asked, _USERS), strict=True)
            ]
        return np.asarray(torch.cat(scores))


def _parts(history: History) -> list[History]:
    return [History(*part) for part in zip(*(torch.split(one, _USERS) for one in history), strict=True)]


def _at_least_one(history: History) -> History:
    """A user without events has seen the padding item."""
    return history._replace(lengths=history.lengths.clamp(min=1))
