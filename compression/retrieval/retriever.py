"""One or several networks as what is served: a user's vector, and an item's score its product with a row.

The mean of log P(item) over M networks (`compression.retrieval.ensemble.mean_of`) is the mean of their logits
less that of their log-partitions, which is the same number for every item. So it orders items as the mean of
the logits does, (u₁·v₁ + … + u_M·v_M) / M, and that is one product: of the user vectors side by side, each
divided by M, with the item rows side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from compression.evaluation.scoring import to_history
from compression.retrieval.network import RetrievalNetwork
from compression.training.model import Encoded, History
from features.encoding import HistoryArrays

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


class Retriever(nn.Module):
    """Networks over one vocabulary. Who has no history has a vector of zeros, so that all items score alike
    and what is counted decides."""

    def __init__(self, networks: Iterable[RetrievalNetwork]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    @property
    def members(self) -> list[RetrievalNetwork]:
        return [cast(RetrievalNetwork, network) for network in self.networks]

    @property
    def dim(self) -> int:
        """Of the vectors: the widths of all networks together."""
        return sum(network.config.dim for network in self.members)

    @property
    def max_history(self) -> int:
        """Events that every network takes."""
        return min(network.config.max_history for network in self.members)

    @property
    def appends(self) -> bool:
        """Whether it has states that an event can be appended to: one network without positions."""
        return len(self.networks) == 1 and self.members[0].config.appends

    def item_table(self) -> Tensor:
        """[item_rows, dim]: what scores an item."""
        return torch.cat([network.table().detach() for network in self.members], 1)

    def event_table(self) -> Tensor:
        """[item_rows, dim]: an item as it is read, before its category is added."""
        return torch.cat([network.items.weight.detach() for network in self.members], 1)

    def user_vectors(self, history: History) -> Tensor:
        """[B, dim] of right-padded histories of 0 to max_history events."""
        some = history._replace(lengths=history.lengths.clamp(min=1))
        vectors = torch.cat([network.user_vectors(some) for network in self.members], 1)
        return torch.where(history.lengths[:, None] > 0, vectors / len(self.networks), 0.0)

    def encode(self, history: History) -> Encoded:
        """User vectors as above, with the states of all slots. Where it `appends`."""
        encoded = self.members[0].encode(history._replace(lengths=history.lengths.clamp(min=1)))
        vectors = torch.where(history.lengths[:, None] > 0, encoded.user_vector, 0.0)
        return encoded._replace(user_vector=vectors)

    def append(self, states: Sequence[Tensor], event: History) -> Encoded:
        """`RetrievalNetwork.append`, where it `appends`."""
        return self.members[0].append(states, event)

    def score(self, vectors: Tensor, candidates: Tensor) -> Tensor:
        """[B, C] of user vectors and item rows [B, C]."""
        rows = torch.cat([network.rows(candidates) for network in self.members], -1)
        return torch.einsum("bd,bcd->bc", vectors, rows)


class RetrieverScorer:
    """A retriever as evaluation sees a model (`compression.evaluation.scoring.Scorer`)."""

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever.eval()
        self._table: Float32 = retriever.item_table().numpy()

    def item_table(self) -> Float32:
        return self._table

    def user_vectors(self, histories: HistoryArrays) -> Float32:
        with torch.inference_mode():
            vectors: Float32 = self._retriever.user_vectors(to_history(histories)).float().numpy()
        return vectors

    def rank(self, histories: HistoryArrays, candidates: Int32, categories: Int32) -> Float32:
        rows = self._table[candidates]
        scores: Float32 = np.einsum("bd,bcd->bc", self.user_vectors(histories), rows)
        return scores


@torch.no_grad()
def stand_in(networks: Iterable[RetrievalNetwork], known: int) -> None:
    """Give the hash buckets of each, which training teaches nothing, the mean of the rows of the known items:
    what is new then scores as the catalogue does in the mean, until what is counted of it says more."""
    for network in networks:
        table = network.items.weight
        table[known + 1 :] = table[1 : known + 1].mean(0)
        if network.categories is not None:
            categories, of_known = network.categories.weight, network.item_categories[1 : known + 1]
            categories[int(of_known.max()) + 1 :] = categories[of_known].mean(0)
