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

from compression.denormals import flushed
from compression.evaluation.predictors import Statistics
from compression.evaluation.scoring import row_categories
from compression.evaluation.transitions import COUNTS
from compression.logs.dataset import Sequences, Split, batches, prefix_windows, training_windows
from compression.retrieval.averaging import RunningMean, Weights, best_of, mean, weights_of
from compression.retrieval.judge import Judge, Verdict
from compression.retrieval.network import RetrievalNetwork
from compression.retrieval.recipe import RetrievalRecipe
from compression.retrieval.spectral import start_table
from compression.retrieval.state import TrainingState
from compression.retrieval.step import Step, without
from features.encoding import Vocabulary, encode_histories

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


@flushed()
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
    `folder` keeps the state after every epoch: the same call goes on where it was stopped, and one with
    other limits where that one ended; what is trained already is never cut back."""
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


@flushed()
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
        self._sequences, self._split, self._vocabulary = sequences, split, vocabulary
        self._recipe, self._seed, self._keep = recipe, seed, keep
        self.network = RetrievalNetwork(recipe.network(vocabulary.item_rows, vocabulary.category_rows))
        if self.network.categories is not None:
            self.network.item_categories.copy_(torch.from_numpy(row_categories(vocabulary)))
        if recipe.recency:
            self.network.start_with_recent(recipe.recency)
        if recipe.start == "counts":
            start_table(self.network, statistics, COUNTS[recipe.counts or "sparse"], seed)
        self._step = Step(self.network, recipe, statistics)
        self._mean = RunningMean(self.network, recipe.ema) if recipe.ema else None
        self.epochs: list[Epoch] = []
        self.kept: dict[int, Weights] = {}
        self._spent_core_s = self._spent_s = 0.0
        of = {
            "recipe": recipe.trains(),
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
        while (stopped := self._why_stop(last, judge is not None)) is None:
            number = len(self.epochs) + 1
            best = max((e.verdict.fused for e in self.epochs if e.verdict), default=0.0)
            note = f"epoch {number}" + (f", best {best:.4f}" if best else "")
            loss = self._epoch(number, self._teller(progress, last, judge is not None, note))
            verdict = None
            if judge and (number % self._recipe.judge_every == 0 or number == last or self._late()):
                verdict = judge(self._judged_network())
            self.epochs.append(
                Epoch(number, round(loss, 4), verdict, round(self.core_seconds, 1), round(self.seconds, 1))
            )
            self._keep_weights(number)
            self._save(number)
        return stopped

    def _why_stop(self, last: int, judged: bool) -> str | None:
        """By what the epochs so far say and nothing else, so that a finished training stays finished."""
        if len(self.epochs) >= last:
            return "epochs"
        if not judged or not self.epochs:
            return None
        if self.epochs[-1].core_seconds > 60 * self._recipe.max_core_minutes:
            return "time"
        return "validation" if len(self.epochs) - self._best() >= self._recipe.patience else None

    def _late(self) -> bool:
        return self.core_seconds > 60 * self._recipe.max_core_minutes

    def result(self, selection: Selection, stopped: str) -> TrainedRetrieval:
        return TrainedRetrieval(
            self.network.eval(), self.epochs, selection, stopped, self.core_seconds, self.seconds
        )

    def _epoch(self, number: int, tell: Callable[[float], None]) -> float:
        """One pass; all it draws comes from the seed and the number. The mean loss."""
        recipe, rng = self._recipe, np.random.default_rng([self._seed, number])
        torch.manual_seed(int(rng.integers(2**62)))
        self.network.train()
        if recipe.prefixes:
            starts, ends = prefix_windows(self._sequences, self._split.train_ends, recipe.max_history)
        else:
            starts, ends = training_windows(self._sequences, self._split.train_ends, recipe.max_history, rng)
        losses: list[float] = []
        steps = -(-len(starts) // recipe.batch_windows)
        for batch_starts, batch_ends in batches(starts, ends, recipe.batch_windows, rng):
            events = without(self._sequences.windows(batch_starts, batch_ends), recipe.event_dropout, rng)
            length = int(events.lengths.max())
            losses.append(self._step(encode_histories(events, self._vocabulary, length), rng))
            if self._mean:
                self._mean.update()
            tell(number - 1 + len(losses) / steps)
        return float(np.mean(losses)) if losses else 0.0

    def _teller(
        self, progress: Progress | None, last: int, limited: bool, note: str
    ) -> Callable[[float], None]:
        """Takes the epochs done and tells the share of the training that is, by epochs or by time."""

        def tell(done: float) -> None:
            if progress:
                by_time = self.core_seconds / (60 * self._recipe.max_core_minutes) if limited else 0.0
                progress(min(1.0, max(done / last, by_time)), note)

        return tell

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


def _epoch_from(record: dict[str, Any]) -> Epoch:
    verdict = record["verdict"]
    return Epoch(**(record | {"verdict": Verdict(**verdict) if verdict else None}))
