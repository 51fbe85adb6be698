"""Training: every event of a window predicts the next one, and at a few of them candidates compete.

Retrieval loss: softmax over the whole catalogue while it is small, over negatives shared by the batch
(with the logQ correction) beyond. Ranking loss: the item that came next against the user's own earlier
items, its category, popular and any items; candidates see the history up to their position only.
Some items of each batch stand in their hash bucket, so that buckets mean something when an item the
vocabulary lacks turns up. Several processes may train one network together (`Group`): each draws the same
batches and takes its share of every one.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compression.evaluation.among import among_candidates, draw_candidates
from compression.evaluation.catalogue import full_catalogue
from compression.evaluation.predictors import Statistics
from compression.evaluation.scoring import TorchScorer, row_categories
from compression.evaluation.targets import Targets, histories_before, metrics
from compression.logs.dataset import Sequences, Split, batches, training_windows
from compression.releases.registry import ModelShape
from compression.smaller.plan import NONE, Compression
from compression.training.checkpoint import Checkpoints, repeatable
from compression.training.goals import Goals
from compression.training.group import ALONE, Group, GroupBroken
from compression.training.lesson import Lesson
from compression.training.losses import Losses
from compression.training.model import Recommender
from compression.training.optimizer import Optimizer
from features.encoding import Vocabulary, encode_histories

Int64 = npt.NDArray[np.int64]
Precision = Literal["f32", "bf16"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long, how hard and for what to train. Sizes of the network stand here too, and what is
    made smaller afterwards. `sparse_items`: of
    more items than that a step changes only the rows it touches (`compression.training.optimizer`);
    `precision` is that of products, weights and losses are f32."""

    dim: int = 64
    layers: int = 2
    heads: int = 1
    ffn: int = 128
    max_history: int = 100
    max_items: int = 500_000
    item_buckets: int = 1024
    category_buckets: int = 64
    epochs: int = 30
    max_minutes: float = 60.0
    patience: int = 4
    batch_windows: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    dropout: float = 0.1
    item_dropout: float = 0.1
    full_softmax_items: int = 20_000
    negatives: int = 2_048
    ranking_positions: int = 4
    ranking_weight: float = 0.5
    judge_limit: int = 2_000
    sparse_items: int = 100_000
    precision: Precision = "f32"
    goals: Goals = field(default_factory=Goals)
    compression: Compression = NONE

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision is {' or '.join(get_args(Precision))}, not {self.precision!r}")

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Self:
        """From what `asdict` and JSON made of one; what it does not say is as it was before it could."""
        goals, compression = Goals.of(told.get("goals", {})), Compression.of(told.get("compression", {}))
        return cls(**{**told, "goals": goals, "compression": compression})

    def shape(self, vocabulary: Vocabulary) -> ModelShape:
        """Of the network that is trained for these items."""
        return ModelShape(
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            ffn=self.ffn,
            max_history=self.max_history,
            item_rows=vocabulary.item_rows,
            category_rows=vocabulary.category_rows,
        )


LAPTOP: Final = Recipe(
    epochs=20,
    max_minutes=1.0,
    full_softmax_items=2_000,
    negatives=1_024,
    ranking_positions=2,
    judge_limit=1_000,
    batch_windows=32,
    learning_rate=2e-3,
)
TINY: Final = Recipe(dim=32, ffn=64, layers=1, epochs=3, max_minutes=0.5, batch_windows=32, judge_limit=500)
RECIPES: Final = {"laptop": LAPTOP, "tiny": TINY, "full": Recipe()}


@dataclass(frozen=True, slots=True)
class Epoch:
    """One pass over the training windows, and how good the model was after it."""

    number: int
    retrieval_loss: float
    ranking_loss: float
    retrieval_ndcg: float
    ranking_ndcg: float
    seconds: float

    @property
    def judged(self) -> float:
        return self.retrieval_ndcg + self.ranking_ndcg


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """The best model by validation, in evaluation mode, and how it got there. `sent_bytes`: what each
    process handed over to be summed."""

    model: Recommender
    epochs: list[Epoch]
    best: int
    stopped: str
    sent_bytes: int = 0


def train(
    sequences: Sequences,
    split: Split,
    vocabulary: Vocabulary,
    recipe: Recipe,
    *,
    seed: int = 1,
    progress: Callable[[float, str], None] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    checkpoints: Checkpoints | None = None,
    lesson: Lesson | None = None,
    group: Group = ALONE,
) -> Trained:
    """Train until the epochs or the minutes are spent, or validation NDCG no longer rises. Starts from
    `weights` where they are given; goes on where `checkpoints` left off; learns a `lesson` beside, in
    one process only. The first process of a `group` calls this, every other one `assist`."""
    if lesson is not None and group.size > 1:
        raise ValueError("a lesson is learnt by one process")
    task = _Task(sequences, split, vocabulary, recipe, seed)
    task.handed(group)
    return _train(task, group, checkpoints or Checkpoints(), lesson or Lesson(), progress, weights)


def assist(group: Group, stopping: Callable[[], bool] = lambda: False) -> None:
    """The part of every process of a group but its first: the same training, of which nothing is kept."""
    task = _Task.handed_to(group)
    _train(task, group, Checkpoints(stopping=stopping), Lesson(), None, None)


@repeatable()
def _train(
    task: _Task,
    group: Group,
    checkpoints: Checkpoints,
    lesson: Lesson,
    progress: Callable[[float, str], None] | None,
    weights: Mapping[str, Tensor] | None,
) -> Trained:
    sequences, split, vocabulary, recipe = task.sequences, task.split, task.vocabulary, task.recipe
    torch.manual_seed(task.seed)
    rng = np.random.default_rng(task.seed)
    model = Recommender(recipe.shape(vocabulary), recipe.dropout)
    if weights is not None:
        model.load_state_dict(weights)
    lesson.begin(model)
    model.to(group.device)
    statistics = Statistics(sequences, split, vocabulary)
    judge = _Judge(sequences, split, vocabulary, statistics, recipe)
    losses = Losses(vocabulary, statistics, recipe, rng, lesson, group)
    large = len(vocabulary.item_ids) > recipe.sparse_items and not losses.full_softmax
    # A lesson may compute the table from other parameters.
    by_rows = large and isinstance(model.items.weight, torch.nn.Parameter)
    optimizer = Optimizer(model, recipe, group, by_rows=by_rows)
    at = checkpoints.restore(model, optimizer.parts, group)
    group.same_weights(model)
    best_weights = at.kept.setdefault("best", copy.deepcopy(model.state_dict()))
    done, stopped = [Epoch(**epoch) for epoch in at.done], "epochs"
    started = time.monotonic() - at.seconds
    deadline = started + 60 * recipe.max_minutes
    for number in range(at.epoch, recipe.epochs):
        model.train()
        at.begin_epoch(rng)
        starts, ends = training_windows(sequences, split.train_ends, recipe.max_history, rng)
        order = list(batches(starts, ends, recipe.batch_windows, rng))
        checkpoints.resume_rng(rng)
        for batch_starts, batch_ends in order[at.step :]:
            length = int((batch_ends - batch_starts).max())
            windows = encode_histories(sequences.windows(batch_starts, batch_ends), vocabulary, length)
            drawn = losses.draw(windows)
            if group.size > 1:
                # Dropout differs from process to process, and is the same again after a restart.
                told = np.random.SeedSequence([task.seed, number, at.step, group.rank])
                torch.manual_seed(int(told.generate_state(1)[0]))
            retrieval, ranking, taught = losses(model, drawn)
            optimizer.zero_grad()
            torch.autograd.backward(retrieval + recipe.ranking_weight * ranking + taught)
            asked_to_end = checkpoints.asked_to_end()
            late = group.leads and time.monotonic() > deadline
            touched = None if losses.full_softmax else losses.touched(drawn)
            said = optimizer.step(touched, [retrieval.detach(), ranking.detach(), asked_to_end, late])
            at.sums = [at.sums[0] + said[0], at.sums[1] + said[1]]
            at.step += 1
            at.seconds = time.monotonic() - started
            checkpoints.offer(model, optimizer.parts, rng, at, ends=said[2] > 0)
            if progress:
                by_epochs = (number + at.step / len(order)) / recipe.epochs
                by_time = at.seconds / (deadline - started)
                progress(min(1.0, max(by_epochs, by_time)), f"epoch {number + 1}")
            if said[3] > 0:
                break
        group.check(model)
        retrieval_ndcg, ranking_ndcg = judge(model, group)
        done.append(
            Epoch(
                number + 1,
                round(at.sums[0] / max(1, at.step), 4),
                round(at.sums[1] / max(1, at.step), 4),
                retrieval_ndcg,
                ranking_ndcg,
                round(time.monotonic() - started, 1),
            )
        )
        at.done.append(asdict(done[-1]))
        at.end_epoch()
        if at.best < 0 or done[-1].judged > done[at.best].judged:
            at.best, best_weights = number, copy.deepcopy(model.state_dict())
            at.kept["best"] = best_weights
        if group.agreed(time.monotonic() > deadline):
            stopped = "time"
            break
        if number - at.best >= recipe.patience:
            stopped = "validation"
            break
    model.load_state_dict(best_weights)
    lesson.end(model)
    return Trained(model.cpu().eval(), done, at.best + 1, stopped, group.sent_bytes)


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """What is trained, as the first process hands it to the others."""

    sequences: Sequences
    split: Split
    vocabulary: Vocabulary
    recipe: Recipe
    seed: int

    def handed(self, group: Group) -> None:
        vocabulary = self.vocabulary
        told = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "recipe": asdict(self.recipe),
            "seed": self.seed,
            "split": self.split.name,
            "buckets": [vocabulary.item_buckets, vocabulary.category_buckets],
        }
        group.handed(told, {name: torch.from_numpy(column) for name, column in self._columns().items()})

    @classmethod
    def handed_to(cls, group: Group) -> Self:
        told, tensors = group.handed({}, {})
        if told["torch"] != torch.__version__:
            raise GroupBroken(
                f"process {group.rank} has torch {torch.__version__}, the first one {told['torch']}"
            )
        torch.set_num_threads(told["threads"])
        found = {name: tensor.numpy() for name, tensor in tensors.items()}

        def part(kind: type) -> dict[str, npt.NDArray[Any]]:
            names = [one.name for one in fields(kind)]
            return {
                name: found[f"{kind.__name__}.{name}"] for name in names if f"{kind.__name__}.{name}" in found
            }

        item_buckets, category_buckets = told["buckets"]
        return cls(
            Sequences(**part(Sequences)),
            Split(told["split"], **part(Split)),
            Vocabulary(**part(Vocabulary), item_buckets=item_buckets, category_buckets=category_buckets),
            Recipe.of(told["recipe"]),
            told["seed"],
        )

    def _columns(self) -> dict[str, npt.NDArray[Any]]:
        """Every array of it, by class and field."""
        return {
            f"{type(whole).__name__}.{one.name}": array
            for whole in (self.sequences, self.split, self.vocabulary)
            for one in fields(whole)
            if isinstance(array := getattr(whole, one.name), np.ndarray)
        }


class _Judge:
    """Validation NDCG@10 of both heads, on the same targets and candidates every time."""

    def __init__(
        self,
        sequences: Sequences,
        split: Split,
        vocabulary: Vocabulary,
        statistics: Statistics,
        recipe: Recipe,
    ) -> None:
        self._vocabulary = vocabulary
        self._histories = histories_before(sequences, vocabulary, recipe.max_history)
        self._targets = Targets.draw(
            sequences, split.validation, vocabulary, limit=recipe.judge_limit, seed=3
        )
        self._candidates = draw_candidates(sequences, self._targets, statistics, vocabulary, seed=3)
        self._categories = row_categories(vocabulary)

    def __call__(self, model: Recommender, group: Group = ALONE) -> tuple[float, float]:
        """Each process judges by its share of the targets; the figures are of all."""
        model.eval()
        on_cpu = model if group.device.type == "cpu" else copy.deepcopy(model).cpu()
        scorer = TorchScorer(on_cpu, self._categories)
        ours = Targets(self._targets.positions[group.share], self._targets.rows[group.share])
        candidates = self._candidates[group.share]
        retrieval = full_catalogue(scorer, self._histories, ours, len(self._vocabulary.item_ids))
        ranking = among_candidates(scorer, self._histories, ours, self._vocabulary, candidates)
        count = len(self._targets.rows)
        return _ndcg(group.whole(retrieval, count)), _ndcg(group.whole(ranking, count))


def _ndcg(ranks: npt.NDArray[np.float64]) -> float:
    return metrics(ranks, (10,))["ndcg@10"]
