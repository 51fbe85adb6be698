"""One step of a training: a batch of windows to a loss, gradients and changed weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from compression.evaluation.predictors import Statistics
from compression.evaluation.scoring import to_history
from compression.logs.dataset import before_last
from compression.retrieval.averaging import Weights
from compression.retrieval.losses import Negatives, full_softmax, shared_negatives
from compression.retrieval.network import RetrievalNetwork
from compression.retrieval.recipe import RetrievalRecipe
from features.encoding import HistoryArrays
from features.sequence import SequenceBatch


class Step:
    """One batch of windows: loss, gradients, optimizer."""

    def __init__(self, network: RetrievalNetwork, recipe: RetrievalRecipe, statistics: Statistics) -> None:
        self._network, self._recipe = network, recipe
        self._known = statistics.known_items
        self._low = torch.bfloat16 if recipe.bf16 and multiplies_bf16() else torch.float32
        self._negatives = None
        if self._known > recipe.full_softmax_items:
            self._negatives = Negatives(statistics.counts[1:], recipe.negatives)
        matrices = [p for name, p in network.named_parameters() if name.startswith("layers") and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        rest = [p for p in network.parameters() if id(p) not in chosen]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": rest, "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            fused=True,
        )

    def __call__(self, windows: HistoryArrays, rng: np.random.Generator) -> float:
        history = before_last(windows)
        events = history.lengths
        targets = windows.items[:, 1:].astype(np.int64)
        slots = np.arange(targets.shape[1])
        inside = slots == events[:, None] - 1 if self._recipe.prefixes else slots < events[:, None]
        learnable = torch.from_numpy(np.flatnonzero(inside & (targets <= self._known)))
        with torch.autocast("cpu", torch.bfloat16, enabled=self._low == torch.bfloat16):
            states = self._network(to_history(history))
        asked = states.flatten(0, 1)[learnable].float()
        places = torch.from_numpy(targets.reshape(-1))[learnable] - 1
        loss = self._loss(asked, places, rng)
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._network.parameters(), 1.0)
        self._optimizer.step()
        return float(loss.detach())

    def _loss(self, states: Tensor, places: Tensor, rng: np.random.Generator) -> Tensor:
        table = self._network.table()[1 : self._known + 1]
        if self._negatives is None:
            return full_softmax(states, table, places, low=self._low)
        drawn = self._negatives.draw(rng)
        return shared_negatives(states, table, places, drawn, self._negatives.log_expected)

    def optimizer_tensors(self) -> Weights:
        """By the parameter's number and the name of what is kept about it."""
        state: dict[int, dict[str, Tensor]] = self._optimizer.state_dict()["state"]
        return {f"{number}.{name}": one for number, kept in state.items() for name, one in kept.items()}

    def load_optimizer(self, tensors: Weights) -> None:
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = tensor
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})


def without(events: SequenceBatch, share: float, rng: np.random.Generator) -> SequenceBatch:
    """The same windows with a share of their events left out; two of each stay, if it had two."""
    if not share:
        return events
    starts = np.cumsum(events.lengths) - events.lengths
    kept = rng.random(int(events.lengths.sum())) >= share
    # Two neighbours at a random place stay in any case, so that there is something to foretell.
    first = starts + (rng.random(len(starts)) * np.maximum(1, events.lengths - 1)).astype(np.int64)
    kept[first] = True
    kept[np.minimum(first + 1, starts + events.lengths - 1)] = True
    return SequenceBatch(
        np.add.reduceat(kept.astype(np.int64), starts),
        events.items[kept],
        events.categories[kept],
        events.behaviors[kept],
        events.timestamps[kept],
    )


def multiplies_bf16() -> bool:
    """Whether the processor has instructions for products of bfloat16; without, autocast only costs."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
