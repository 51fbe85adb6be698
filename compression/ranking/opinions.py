"""What a teacher thinks of windows, asked once: in every epoch most windows are those of the epoch before."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from compression.retrieval.network import RetrievalNetwork
from compression.training.model import History

MOST_BYTES: Final = 2**29  # of states that are kept


class KeptStates:
    """User vectors of a network that does not change, kept by a window's items in `dtype`; when there is no
    more room, other windows are computed each time."""

    def __init__(self, network: RetrievalNetwork, dtype: torch.dtype, most_bytes: int = MOST_BYTES) -> None:
        if network.behaviors is not None or network.gaps is not None:
            raise ValueError("windows are known by their items, and this network sees more of them")
        self.network, self._dtype = network, dtype
        self._left = most_bytes
        self._kept: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def __call__(self, history: History) -> Tensor:
        """[B, L, d] after every event of right-padded histories; zero where there is none."""
        lengths = history.lengths.tolist()
        keys = [
            items[:length].numpy().tobytes() for items, length in zip(history.items, lengths, strict=True)
        ]
        unknown = [place for place, key in enumerate(keys) if key not in self._kept]
        new: dict[int, Tensor] = {}
        if unknown:
            found = self.network(History(*(part[unknown] for part in history))).to(self._dtype)
            for place, states in zip(unknown, found, strict=True):
                new[place] = states[: lengths[place]].clone()
        made = torch.zeros(*history.items.shape, self.network.config.dim, dtype=self._dtype)
        for place, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            states = new[place] if place in new else self._kept[key]
            made[place, :length] = states
            if key not in self._kept and states.nbytes <= self._left:
                self._kept[key] = states
                self._left -= states.nbytes
        return made
