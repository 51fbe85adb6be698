"""The search: latency and size as small as they get, at a loss of accuracy that is allowed.

What a recipe's network weighs and takes is known before it is taught, so one that is worse in both than what
was found already costs next to nothing. Half way through its epochs a network that is far off the allowed
loss is given up. All is kept in a journal of JSON lines: a search that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from compression.ranking.graph import Form
from compression.ranking.judging import Data, losses
from compression.ranking.network import CandidateRanker
from infra.tuning import network
from infra.tuning.recipe import Recipe, suggest

Progress = Callable[[str, float, str], None]  # step, fraction of it, what it is doing
HOPELESS: Final = 0.05  # beyond the allowed loss, half way
STARTUP: Final = 8  # drawn at random before the sampler has something to go by

# Where to begin: Table I's "Quantized" and "Pruned + Quantized", half the layers of the latter, and that with
# product codes for the table, or with weights that pairs of layers share.
_WHOLE: Final[dict[str, Any]] = {
    "kind": "shrunk",
    "attention": "full",
    "weights": "own",
    "matrix_bits": 8,
    "layers": 1.0,
    "heads": 1.0,
    "channel_share": 1.0,
    "table": "rounded",
    "table_bits": 8,
    "zeros": 0.0,
}
_PRUNED: Final = _WHOLE | {"table_bits": 5, "heads": 0.6, "channel_share": 0.6}
_HALF: Final = _PRUNED | {"layers": 0.5}
ANCHORS: Final[tuple[dict[str, Any], ...]] = (
    _WHOLE,
    _PRUNED | {"zeros": 0.4},
    _HALF,
    _HALF | {"table": "product codes", "piece_width": 2},
    _HALF | {"weights": "shared by pairs"},
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What is allowed and how long it may take. `loss` is a share of the whole network's `metric`, on
    validation; `epochs` teach each network."""

    loss: float = 0.01
    metric: str = "ndcg@50"
    epochs: float = 2.0
    trials: int = 24


class Search:
    """A search in a folder: `journal.log` and a stored network for each trial that was taught to the end."""

    def __init__(
        self,
        folder: Path,
        whole: CandidateRanker,
        whole_bytes: int,
        validation: Data,
        limits: Limits,
        *,
        form: Form,
        candidates: int,
        seed: int,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._whole, self._bytes = folder, whole, whole_bytes
        self._data, self._limits, self._seed = validation, limits, seed
        self._base = validation.ranks(whole)
        self._watch = network.Stopwatch(whole, form, candidates, seed)
        self.study = self._open()

    def run(self, progress: Progress | None = None) -> None:
        """Trials until there are as many as the limits say, those of earlier runs counted."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # Whoever ran it was stopped.
            self.study.tell(trial.number, state=TrialState.FAIL)
        while (done := len(self._finished())) < self._limits.trials:
            if progress:
                progress("tune", done / self._limits.trials, f"{len(self.study.best_trials)} on the front")
            self.study.optimize(self._try, n_trials=1)
        if progress:
            progress("tune", 1.0, f"{len(self.study.best_trials)} on the front")

    @property
    def front(self) -> list[FrozenTrial]:
        """Trials within the allowed loss that no other such one beats in both, fastest first."""
        return sorted(self.study.best_trials, key=lambda trial: trial.values)

    def network_of(self, trial: FrozenTrial) -> CandidateRanker:
        recipe = Recipe.model_validate(trial.user_attrs["recipe"])
        return network.load(recipe, self._whole, self._path(trial.number))

    def _open(self) -> optuna.Study:
        journal = self._folder / "journal.log"
        known = journal.is_file()
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name="tune",
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
        if not known:
            config = self._whole.network.config
            for anchor in ANCHORS:
                counted = {
                    "heads": max(1, round(anchor["heads"] * config.heads)),
                    "layers": max(1, round(anchor["layers"] * config.layers)),
                }
                study.enqueue_trial(anchor | counted)
        finished = len(study.get_trials(deepcopy=False))
        # Another seed after each stop, or the same would be drawn again.
        study.sampler = optuna.samplers.TPESampler(seed=self._seed + finished, n_startup_trials=STARTUP)
        return study

    def _finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))

    def _path(self, number: int) -> Path:
        return self._folder / f"trial-{number}.packed"

    def _try(self, trial: optuna.Trial) -> tuple[float, float]:
        recipe = suggest(trial, self._whole.network.config)
        trial.set_user_attr("recipe", recipe.model_dump(mode="json"))
        ranker = network.begin(recipe, self._whole, self._seed)
        latency, took_ms = self._watch.share(ranker, network.grids(recipe, ranker))
        path = self._path(trial.number)
        size = network.store(recipe, ranker, path) / self._bytes
        for name, figure in (("latency_share", latency), ("size_share", size), ("p50_ms", took_ms)):
            trial.set_user_attr(name, round(figure, 4))
        try:
            self._refuse_beaten(latency, size)
            for half in (1, 2):
                network.teach(
                    recipe,
                    ranker,
                    self._whole,
                    self._data,
                    epochs=self._limits.epochs / 2,
                    seed=self._seed + half,
                )
                lost = losses(self._data.ranks(ranker), self._base, [self._limits.metric])
                found = lost[self._limits.metric]
                trial.set_user_attr("loss", found)
                over = found["loss"] - self._limits.loss
                if half == 1 and over > HOPELESS:
                    trial.set_constraint("loss", over)
                    raise optuna.TrialPruned("far off")
        except optuna.TrialPruned as why:
            trial.set_user_attr("given_up", str(why))
            path.unlink(missing_ok=True)
            raise
        trial.set_constraint("loss", over)
        size = network.store(recipe, ranker, path) / self._bytes
        return latency, size

    def _refuse_beaten(self, latency: float, size: float) -> None:
        for other in self.study.best_trials:
            if other.values[0] <= latency and other.values[1] <= size:
                raise optuna.TrialPruned(f"beaten by trial {other.number}")
