"""Training for retrieval: every event of a window predicts the next one, validation says when to stop.

What was best on validation, an epoch or the mean of the weights of several, is the selection; `refit`
trains the same epochs anew with the validation items too, when there is nothing left to select by.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compression.dataset import Sequences, Split, batches, training_windows
from compression.predictors import Statistics
from compression.retrieval.averaging import RunningMean, Weights, best_of, mean, weights_of
from compression.retrieval.judge import Judge, Verdict
from compression.retrieval.losses import Negatives, full_softmax, shared_negatives
from compression.retrieval.network import RetrievalNetwork
from compression.retrieval.recipe import RetrievalRecipe
from compression.retrieval.state import TrainingState
from compression.scoring import to_history
from features.encoding import HistoryArrays, Vocabulary, encode_histories

Progress = Callable[[float, str], None]  # fraction of the training, what it is doing


@dataclass(frozen=True, slots=True)
class Epoch:
    """One pass over the windows; the verdict is None where it was not judged."""

    number: int
    loss: float
    verdict: Verdict | None
    core_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Selection:
    """What validation chose: the epochs whose weights are averaged, and the weight of the counts."""

    epochs: tuple[int, ...]
    verdict: Verdict


@dataclass(frozen=True, slots=True, eq=False)
class TrainedRetrieval:
    """A network in evaluation mode, and how it came about. Seconds are of this training, judging and
    all, over every process that took part in it."""

    network: RetrievalNetwork
    epochs: list[Epoch]
    selection: Selection
    stopped: str
    core_seconds: float
    seconds: float


def train(
    sequences: Sequences,
    split: Split,
    vocabulary: Vocabulary,
    recipe: RetrievalRecipe,
    *,
    seed: int,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> TrainedRetrieval:
    """Train until the epochs or the minutes are spent, or validation no longer rises, and select.
    `folder` keeps the state after every epoch: the same call goes on where it was stopped."""
    statistics = Statistics(sequences, split, vocabulary)
    judge = Judge(sequences, split, vocabulary, statistics, recipe)
    run = _Run(sequences, split, vocabulary, recipe, statistics, seed, folder)
    stopped = run.until(recipe.epochs, judge, progress)
    judged = {epoch.number: epoch.verdict for epoch in run.epochs if epoch.verdict is not None}
    best, *_ = chosen = best_of(((n, v.fused) for n, v in judged.items()), recipe.averaged)
    run.network.load_state_dict(run.kept[best])
    selection = Selection((best,), judged[best])
    for count in range(2, len(chosen) + 1):
        averaged = mean([run.kept[epoch] for epoch in chosen[:count]])
        run.network.load_state_dict(averaged)
        verdict = judge(run.network)
        if verdict.fused > selection.verdict.fused:
            selection = Selection(tuple(sorted(chosen[:count])), verdict)
    return run.result(selection, stopped)


def refit(
    sequences: Sequences,
    split: Split,
    vocabulary: Vocabulary,
    recipe: RetrievalRecipe,
    selection: Selection,
    *,
    seed: int,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> TrainedRetrieval:
    """Train the selected epochs anew with the validation items too. Nothing is judged."""
    split = split.with_validation(sequences)
    statistics = Statistics(sequences, split, vocabulary)
    run = _Run(sequences, split, vocabulary, recipe, statistics, seed, folder, keep=selection.epochs)
    stopped = run.until(max(selection.epochs), None, progress)
    run.network.load_state_dict(mean([run.kept[epoch] for epoch in selection.epochs]))
    return run.result(selection, stopped)


class _Run:
    """A training that can be left after any epoch and gone on with."""

    def __init__(
        self,
        sequences: Sequences,
        split: Split,
        vocabulary: Vocabulary,
        recipe: RetrievalRecipe,
        statistics: Statistics,
        seed: int,
        folder: Path | None,
        keep: tuple[int, ...] = (),
    ) -> None:
        torch.manual_seed(seed)
        torch.set_flush_denormal(True)
        self._sequences, self._split, self._vocabulary = sequences, split, vocabulary
        self._recipe, self._seed, self._keep = recipe, seed, keep
        self.network = RetrievalNetwork(recipe.network(vocabulary.item_rows))
        self._step = _Step(self.network, recipe, statistics)
        self._mean = RunningMean(self.network, recipe.ema) if recipe.ema else None
        self.epochs: list[Epoch] = []
        self.kept: dict[int, Weights] = {}
        self._spent_core_s = self._spent_s = 0.0
        of = {
            "recipe": recipe.model_dump(mode="json"),
            "seed": seed,
            "keep": keep,
            "events": len(sequences),
            "item_rows": vocabulary.item_rows,
            "learned": int(split.train_ends.sum()),
        }
        self._state = TrainingState(folder, of) if folder else None
        self._resume()
        self._cpu_began, self._began = time.process_time(), time.monotonic()

    @property
    def core_seconds(self) -> float:
        return self._spent_core_s + time.process_time() - self._cpu_began

    @property
    def seconds(self) -> float:
        return self._spent_s + time.monotonic() - self._began

    def until(self, last: int, judge: Judge | None, progress: Progress | None) -> str:
        """Epochs up to and with `last`; why there are no more. A refit has no limit but that."""
        recipe = self._recipe
        while len(self.epochs) < last:
            if judge and self.core_seconds > 60 * recipe.max_core_minutes:
                return "time"
            number = len(self.epochs) + 1
            best = max((e.verdict.fused for e in self.epochs if e.verdict), default=0.0)
            note = f"epoch {number}" + (f", best {best:.4f}" if best else "")
            loss = self._epoch(number, lambda part, note=note: self._tell(progress, part, last, judge, note))
            verdict = None
            if judge and (number % recipe.judge_every == 0 or number == last):
                verdict = judge(self._judged_network())
            self.epochs.append(
                Epoch(number, round(loss, 4), verdict, round(self.core_seconds, 1), round(self.seconds, 1))
            )
            self._keep_weights(number)
            self._save(number)
            if judge and number - self._best() >= recipe.patience:
                return "validation"
        return "epochs"

    def result(self, selection: Selection, stopped: str) -> TrainedRetrieval:
        return TrainedRetrieval(
            self.network.eval(), self.epochs, selection, stopped, self.core_seconds, self.seconds
        )

    def _epoch(self, number: int, tell: Callable[[float], None]) -> float:
        """One pass; all it draws comes from the seed and the number. The mean loss."""
        recipe, rng = self._recipe, np.random.default_rng([self._seed, number])
        torch.manual_seed(int(rng.integers(2**62)))
        self.network.train()
        starts, ends = training_windows(self._sequences, self._split.train_ends, recipe.max_history, rng)
        losses: list[float] = []
        steps = -(-len(starts) // recipe.batch_windows)
        for batch_starts, batch_ends in batches(starts, ends, recipe.batch_windows, rng):
            length = int((batch_ends - batch_starts).max())
            events = self._sequences.windows(batch_starts, batch_ends)
            losses.append(self._step(encode_histories(events, self._vocabulary, length), rng))
            if self._mean:
                self._mean.update()
            tell((number - 1 + len(losses) / steps))
        return float(np.mean(losses)) if losses else 0.0

    def _tell(self, progress: Progress | None, done: float, last: int, judge: Judge | None, note: str) -> None:
        if progress:
            by_time = self.core_seconds / (60 * self._recipe.max_core_minutes) if judge else 0.0
            progress(min(1.0, max(done / last, by_time)), note)

    def _current(self) -> Weights:
        return weights_of(self.network) | (
            {name: one.clone() for name, one in self._mean.weights.items()} if self._mean else {}
        )

    def _judged_network(self) -> RetrievalNetwork:
        network = RetrievalNetwork(self.network.config)
        network.load_state_dict(self._current())
        return network

    def _keep_weights(self, number: int) -> None:
        if self._keep:
            wanted = [epoch for epoch in self._keep if epoch <= number]
        else:
            judged = ((e.number, e.verdict.fused) for e in self.epochs if e.verdict)
            wanted = best_of(judged, self._recipe.averaged)
        if number in wanted:
            self.kept[number] = self._current()
        self.kept = {epoch: weights for epoch, weights in self.kept.items() if epoch in wanted}

    def _best(self) -> int:
        """The number of the best epoch; before any is judged, the newest."""
        judged = ((e.number, e.verdict.fused) for e in self.epochs if e.verdict)
        return next(iter(best_of(judged, 1)), len(self.epochs))

    def _save(self, number: int) -> None:
        if self._state is None:
            return
        last = {f"network.{name}": one for name, one in weights_of(self.network).items()}
        last |= {f"optimizer.{name}": one for name, one in self._step.optimizer_tensors().items()}
        if self._mean:
            last |= {f"mean.{name}": one for name, one in self._mean.weights.items()}
        record = {
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "steps": self._mean.steps if self._mean else 0,
            "core_seconds": self.core_seconds,
            "seconds": self.seconds,
        }
        self._state.save(record, number, last, self.kept)

    def _resume(self) -> None:
        found = self._state.load() if self._state else None
        if found is None:
            return
        record, last, self.kept = found
        self.epochs = [_epoch_from(one) for one in record["epochs"]]
        self._spent_core_s, self._spent_s = float(record["core_seconds"]), float(record["seconds"])
        parts: dict[str, Weights] = {"network": {}, "optimizer": {}, "mean": {}}
        for name, tensor in last.items():
            part, key = name.split(".", 1)
            parts[part][key] = tensor
        self.network.load_state_dict(parts["network"])
        self._step.load_optimizer(parts["optimizer"])
        if self._mean:
            self._mean.load(parts["mean"], int(record["steps"]))


class _Step:
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
            [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=recipe.learning_rate,
            fused=True,
        )

    def __call__(self, windows: HistoryArrays, rng: np.random.Generator) -> float:
        """Each window's last event is a target only."""
        events = np.maximum(windows.lengths - 1, 0).astype(np.int32)
        history = to_history(
            HistoryArrays(
                items=windows.items[:, :-1],
                categories=windows.categories[:, :-1],
                behaviors=windows.behaviors[:, :-1],
                gaps=windows.gaps[:, :-1],
                lengths=events,
            )
        )
        targets = windows.items[:, 1:].astype(np.int64)
        inside = np.arange(targets.shape[1]) < events[:, None]
        learnable = torch.from_numpy(np.flatnonzero(inside & (targets <= self._known)))
        with torch.autocast("cpu", torch.bfloat16, enabled=self._low == torch.bfloat16):
            states = self._network(history)
        asked = states.flatten(0, 1)[learnable].float()
        places = torch.from_numpy(targets.reshape(-1))[learnable] - 1
        loss = self._loss(asked, places, rng)
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._network.parameters(), 1.0)
        self._optimizer.step()
        return float(loss.detach())

    def _loss(self, states: Tensor, places: Tensor, rng: np.random.Generator) -> Tensor:
        table = self._network.items.weight[1 : self._known + 1]
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
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": state})


def multiplies_bf16() -> bool:
    """Whether the processor has instructions for products of bfloat16; without, autocast only costs."""
    capabilities: dict[str, Any] = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def _epoch_from(record: dict[str, Any]) -> Epoch:
    verdict = record["verdict"]
    return Epoch(**(record | {"verdict": Verdict(**verdict) if verdict else None}))
