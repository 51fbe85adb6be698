"""Means of weights: a running one over the steps of a training, and one over chosen epochs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


def weights_of(network: nn.Module) -> Weights:
    """A copy that later steps leave alone."""
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def mean(of: Sequence[Weights]) -> Weights:
    """Name by name; what is no weight but a list of rows is the same in all."""
    return {
        name: torch.stack([one[name] for one in of]).mean(0) if first.is_floating_point() else first
        for name, first in of[0].items()
    }


class RunningMean:
    """mean ← decay · mean + (1 - decay) · weights after every step; over the first steps the decay is
    lower, so that where training began is soon forgotten. Of what is `left_out` no mean is taken."""

    def __init__(self, network: nn.Module, decay: float, left_out: Tensor | None = None) -> None:
        self._live = {name: one for name, one in network.named_parameters() if one is not left_out}
        self.weights = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        self._decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self._decay, self.steps / (self.steps + 9.0))
        torch._foreach_lerp_(list(self.weights.values()), list(self._live.values()), 1.0 - decay)

    def load(self, weights: Weights, steps: int) -> None:
        for name, tensor in self.weights.items():
            tensor.copy_(weights[name])
        self.steps = steps


def best_of(judged: Iterable[tuple[int, float]], count: int) -> list[int]:
    """The `count` epochs that were judged best, best first; of equals the earlier."""
    return [epoch for epoch, _ in sorted(judged, key=lambda one: (-one[1], one[0]))[:count]]
