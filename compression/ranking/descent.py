"""Steps down a loss for a number of passes over a log: batches of windows, optimizers, running mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from compression.denormals import flushed
from compression.logs.dataset import batches, training_windows
from compression.ranking.judging import Data
from compression.retrieval.averaging import RunningMean
from compression.training.checkpoint import Checkpoints
from compression.training.optimizer import clip
from features.encoding import HistoryArrays, encode_histories


@dataclass(frozen=True, slots=True)
class Effort:
    """How long and how hard. Catalogues up to `full_softmax_items` are compared whole, larger ones by
    `negatives`; every so many steps (`candidates_every`) candidates compete. Of a teacher: `taught` is its
    share in what the whole softmax is to be, `opinions` and `maps` weigh what it says of candidates (and
    negatives) and where it looks; where a catalogue is too large to be compared whole, of so many events of a
    step (`listed`) it says which items come first. `mean` is the decay of the running mean of weights, a
    step."""

    epochs: float = 1.0
    max_steps: int = 10**9
    learning_rate: float = 2e-3
    batch_windows: int = 16
    full_softmax_items: int = 20_000
    negatives: int = 1_024
    candidates_every: int = 4
    positions: int = 2
    rivals: int = 15
    taught: float = 0.7
    opinions: float = 1.0
    maps: float = 0.1
    mean: float = 0.99
    listed: int = 0
    bf16: bool = True

    def samples(self, items: int) -> bool:
        """Whether a catalogue is too large to be compared whole; then its table learns row by row."""
        return items > self.full_softmax_items


FROM_SCRATCH: Final = Effort(learning_rate=2e-3, batch_windows=16)
TUNING: Final = Effort(learning_rate=1e-3, batch_windows=32)
"""For what has been trained and was made smaller."""


@flushed()
def descend(
    model: nn.Module,
    loss_of: Callable[[HistoryArrays, int], Tensor],
    data: Data,
    effort: Effort,
    *,
    length: int,
    rng: np.random.Generator,
    after_step: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda taken, last: None,
    checkpoints: Checkpoints | None = None,
    by_rows: nn.Embedding | None = None,
) -> int:
    """Train for the epochs, windows in new order in each; the steps that were taken. The learning rate
    rises over the first steps and falls to nothing with the last. `loss_of` is told the step's number, from
    1 on.

    A table that learns `by_rows` is one of which a step looks few rows up: only these move (SparseAdam), so
    a step costs what its batch is large. A row moves too seldom for its running mean to be another."""
    torch.manual_seed(int(rng.integers(2**62)))
    table = None if by_rows is None else by_rows.weight
    parameters = list(model.parameters())
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [one for one in parameters if one is not table],
            lr=effort.learning_rate,
            weight_decay=0.0,
            fused=True,
        )
    ]
    if by_rows is not None and table is not None:
        by_rows.sparse = True
        optimizers.append(torch.optim.SparseAdam([table], lr=effort.learning_rate))
    mean = RunningMean(model, effort.mean, left_out=table)
    checkpoints = checkpoints or Checkpoints()
    at = checkpoints.restore(model, optimizers)
    steps: int = sum(epoch["steps"] for epoch in at.done) + at.step
    if at.kept:
        mean.load(at.kept["mean"], steps)
    at.kept = {"mean": mean.weights}
    last = at.done[0]["last"] if at.done else steps + 1
    model.train()
    while steps < last:
        at.begin_epoch(rng)
        starts, ends = training_windows(data.sequences, data.split.train_ends, length, rng)
        if not at.done:
            a_pass = -(-len(starts) // effort.batch_windows)
            last = min(effort.max_steps, max(1, round(effort.epochs * a_pass)))
        order = list(batches(starts, ends, effort.batch_windows, rng))
        checkpoints.resume_rng(rng)
        for batch_starts, batch_ends in order[at.step : at.step + last - steps]:
            steps += 1
            warm, left = steps / min(50, 1 + last // 10), (last - steps + 1) / last
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = effort.learning_rate * min(1.0, warm) * left
            events = data.sequences.windows(batch_starts, batch_ends)
            windows = encode_histories(events, data.vocabulary, int(events.lengths.max()))
            loss = loss_of(windows, steps)
            model.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            clip(parameters, table)
            for optimizer in optimizers:
                optimizer.step()
            after_step()
            mean.update()
            at.step += 1
            progress(steps, last)
            if steps < last:
                checkpoints.offer(model, optimizers, rng, at)
        at.done.append({"steps": at.step, "last": last})
        at.end_epoch()
    checkpoints.keep(model, optimizers, rng, at)
    with torch.no_grad():
        live = dict(model.named_parameters())
        for name, weight in mean.weights.items():
            live[name].copy_(weight)
    if by_rows is not None:
        by_rows.sparse = False
    model.eval()
    return steps
