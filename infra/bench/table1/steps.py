"""Train, prune, quantize, distil: steps that each leave a packed file and their figures behind.

A step whose files are there is not taken again, and a training that was stopped goes on from its last
checkpoint, so hours of training can be taken in parts, and a run after a whole one only measures. Without
epochs to train nothing is learned: weights are random, and accuracy is left open.

All that is fine-tuned after it was made smaller has the Baseline for a teacher, and the Baseline itself is
trained on for as long as the longest of them, so that what more training does is seen apart.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from compression.files import write_whole
from compression.logs.dataset import Sequences, build_vocabulary, read_log
from compression.logs.dataset import split as split_sequences
from compression.logs.item_lists import is_item_lists
from compression.logs.synth import SynthSettings, synthesize, write_log
from compression.ranking.descent import FROM_SCRATCH, TUNING, Effort
from compression.ranking.judging import Data, Ranks
from compression.ranking.network import CandidateRanker
from compression.ranking.training import fit
from compression.ranking.weights import TABLE, copy, count, load, narrow_table, untrained
from compression.retrieval.network import NetworkConfig, RetrievalNetwork
from compression.smaller import packed, pruning, structured
from compression.smaller.quantization import Grid, aware
from compression.training.checkpoint import Checkpoints
from infra.bench.table1.shapes import EIGHT, Shape

Say = Callable[[str], None]
BY_SEVERAL: Final = replace(TUNING, batch_windows=16, taught=0.9)
"""For a student that several teach while it is rounded."""
LISTS: Final = replace(TUNING, listed=256, opinions=4.0)
"""Where the catalogue is too large to be compared whole: without the teacher's lists, NDCG falls (LOG.md)."""
LISTS_OF_STUDENT: Final = replace(LISTS, opinions=2.0)
TRAINED_ON: Final = "Baseline, trained on"
METHODS: Final = ("Baseline", "Quantized", "Pruned", "Pruned + Quantized", "Distilled")
MOST_ITEMS: Final = 200_000  # of a log


@dataclass(frozen=True, slots=True)
class Course:
    """The Baseline's learning rate and dropout; a student's dropout; how long what is made smaller is
    trained, by the Baseline's epochs: after each step of pruning, while weights are rounded, a student, and
    while a student's weights are rounded; and how many teach it: the Baseline, the one trained on, the pruned
    one."""

    learning_rate: float
    dropout: float
    student_dropout: float
    round: float
    rounding: float
    student: float
    student_rounding: float
    teachers: int = 1


COURSE: Final = Course(2e-3, 0.1, 0.1, 0.08, 0.08, 0.6, 0.08)
# What people do is harder to learn again than what was drawn from a few numbers, and a wide network is better
# at half the rate (LOG.md).
COURSE_OF_LOGS: Final = Course(1e-3, 0.1, 0.0, 0.25, 0.16, 1.5, 0.16, teachers=3)


def course_of(log: Path | None) -> Course:
    """How networks learn a log, or the synthetic one."""
    return COURSE if log is None else COURSE_OF_LOGS


def recipe_of(shape: Shape, log: Path | None) -> str:
    """Six letters that what is made otherwise does not share."""
    told = shape, course_of(log), FROM_SCRATCH, TUNING, BY_SEVERAL, LISTS, LISTS_OF_STUDENT
    return hashlib.sha256(repr(told).encode()).hexdigest()[:6]


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """One method's network as it is stored and loaded again. `grids` by module: what its graph computes
    with; `zeros`: the share of the Baseline's parameters that are gone or zero; `ranks`: of every target
    that it was judged by."""

    method: str
    ranker: CandidateRanker
    grids: dict[str, Grid]
    bytes: int
    parameters: int
    zeros: float
    ranks: Ranks | None


class Progress:
    """Says now and then which step of a training it is and how long the rest takes at the pace so far."""

    def __init__(
        self, say: Say, *, every_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._every_s, self._clock = say, every_s, clock
        self._first: tuple[int, float] | None = None  # step and time
        self._said_s = clock()

    def __call__(self, taken: int, last: int) -> None:
        now = self._clock()
        if self._first is None:
            self._first = taken, now  # not always the first of the training, which may go on
        if now < self._said_s + self._every_s:
            return
        self._said_s = now
        step, since = self._first
        minutes = (now - since) / max(1, taken - step) * (last - taken) / 60
        self._say(f"  step {taken:,} of {last:,}, about {minutes:.0f} min left")


class Steps:
    """The steps of one shape, in one folder. `epochs` is the Baseline's training, the others' are parts of
    it; `log` is learned from, a synthetic one where there is none."""

    def __init__(
        self,
        shape: Shape,
        folder: Path,
        epochs: float,
        seed: int,
        say: Say = lambda _: None,
        log: Path | None = None,
    ) -> None:
        self._shape, self._folder, self._epochs, self._seed, self._say = shape, folder, epochs, seed, say
        self._log = log
        self._course = course_of(log)
        self._data: Data | None = None
        self._rows = shape.items + 2
        self._under = ""  # the step that is being taken
        self._training: list[Path] = []  # and its checkpoints

    def baseline(self) -> Made:
        """What the others are made from and compared with."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._epochs:
            self._rows = self._count_rows()
        return self._step("Baseline", self._baseline, self._config())

    def all(self) -> list[Made]:
        """Every method, in the order of Table I."""
        baseline = self.baseline()
        config = baseline.ranker.network.config
        quantized = self._step("Quantized", lambda: self._quantized(baseline), config)
        beside = [self.trained_on(baseline).ranker] if self._samples else []
        pruned = self._step("Pruned", lambda: self._pruned(baseline, beside), config)
        both = self._step(
            "Pruned + Quantized", lambda: self._pruned_quantized(pruned, baseline, beside), config
        )
        teachers = [baseline.ranker]
        if self._course.teachers > 1:
            others = [self.trained_on(baseline).ranker, pruned.ranker]
            teachers += others[: self._course.teachers - 1]
        distilled = self._step(
            "Distilled", lambda: self._distilled(teachers), self._shape.student(self._rows)
        )
        return [baseline, quantized, pruned, both, distilled]

    def trained_on(self, baseline: Made) -> Made:
        """The Baseline after as many more epochs as any other method has had after it, by the log alone."""
        return self._step(TRAINED_ON, lambda: self._trained_on(baseline), baseline.ranker.network.config)

    @property
    def _samples(self) -> bool:
        return TUNING.samples(self.items)

    @property
    def _tuning(self) -> Effort:
        return LISTS if self._samples else TUNING

    @property
    def items(self) -> int:
        return self._rows - 2

    def _config(self) -> NetworkConfig:
        config = self._shape.config(self._rows)
        return config.model_copy(update={"dropout": self._course.dropout})

    # Steps: each answers a network and the grids it is to be stored on ---------------------------

    def _baseline(self) -> tuple[CandidateRanker, dict[str, Grid]]:
        ranker = untrained(self._config(), self._seed)
        self._fit(ranker, 1.0, replace(FROM_SCRATCH, learning_rate=self._course.learning_rate))
        return ranker, {}

    def _trained_on(self, baseline: Made) -> tuple[CandidateRanker, dict[str, Grid]]:
        ranker = copy(baseline.ranker)
        self._fit(ranker, self._course.round * self._shape.rounds + self._course.rounding, TUNING)
        return ranker, {}

    def _quantized(self, baseline: Made) -> tuple[CandidateRanker, dict[str, Grid]]:
        """Rounded as it is: training at 8 bits loses more than rounding does."""
        ranker = copy(baseline.ranker)
        return ranker, grids_of(ranker, EIGHT)

    def _pruned(
        self, baseline: Made, beside: Sequence[CandidateRanker]
    ) -> tuple[CandidateRanker, dict[str, Grid]]:
        """Table by threshold, heads and channels for good, K rounds of both (formulas 5 to 7)."""
        shape, ranker = self._shape, copy(baseline.ranker)
        # Matrices lose their share by getting smaller, so what is left to zero is the tables'.
        for number in range(1, shape.rounds + 1):
            part = number / shape.rounds
            heads = round(shape.heads - (shape.heads - shape.kept_heads) * part)
            channels = round(shape.ffn - (shape.ffn - shape.kept_channels) * part)
            structured.shrink(ranker.network, heads=heads, channels=channels)
            masks = self._masks(ranker, shape.pruned * part, baseline.parameters)
            pruning.apply(ranker, masks)
            self._fit(
                ranker,
                self._course.round,
                self._tuning,
                teacher=baseline.ranker,
                beside=beside,
                after_step=lambda kept=masks: pruning.apply(ranker, kept),  # type: ignore[misc]
            )
        return ranker, {}

    def _masks(self, ranker: CandidateRanker, share: float, of: int) -> dict[str, torch.Tensor]:
        """Masks of the table with which that share of `of` parameters is gone or zero."""
        gone = of - count(ranker)
        table = ranker.network.items.weight
        left = max(0.0, (share * of - gone) / table.numel())
        return {f"{TABLE}.weight": pruning.mask(table, pruning.threshold(table, left))}

    def _pruned_quantized(
        self, pruned: Made, baseline: Made, beside: Sequence[CandidateRanker]
    ) -> tuple[CandidateRanker, dict[str, Grid]]:
        grid, course = Grid(self._shape.pruned_bits, per_row=True), self._course
        return self._rounded(pruned.ranker, grid, baseline.ranker, course.rounding, self._tuning, beside)

    def _distilled(self, teachers: Sequence[CandidateRanker]) -> tuple[CandidateRanker, dict[str, Grid]]:
        """From the first teacher's table in fewer dimensions, by its maps and what all of them think, then
        rounded."""
        course, (first, *beside) = self._course, teachers
        config = self._shape.student(self._rows)
        config = config.model_copy(update={"dropout": course.student_dropout})
        student = untrained(config, self._seed + 1)
        narrow_table(student, first)
        self._fit(student, course.student, FROM_SCRATCH, teacher=first, beside=beside)
        grid = Grid(self._shape.student_bits, per_row=True)
        rounding = LISTS_OF_STUDENT if self._samples else BY_SEVERAL if beside else TUNING
        return self._rounded(student, grid, first, course.student_rounding, rounding, beside)

    def _rounded(
        self,
        ranker: CandidateRanker,
        table: Grid,
        teacher: CandidateRanker,
        part: float,
        effort: Effort,
        beside: Sequence[CandidateRanker] = (),
    ) -> tuple[CandidateRanker, dict[str, Grid]]:
        """Quantization-aware training of a copy; what is zero stays zero."""
        ranker = copy(ranker)
        grids = grids_of(ranker, table)
        zero = {name: weight.detach() != 0 for name, weight in pruning.prunable(ranker).items()}
        kept = {name: mask for name, mask in zero.items() if name.startswith(TABLE)}
        with aware(ranker, grids):
            self._fit(
                ranker,
                part,
                effort,
                teacher=teacher,
                beside=beside,
                after_step=lambda: pruning.apply(ranker, kept),
            )
        return ranker, grids

    # ------------------------------------------------------------------------------------------

    def _step(
        self, method: str, make: Callable[[], tuple[CandidateRanker, dict[str, Grid]]], config: NetworkConfig
    ) -> Made:
        """What is stored of the method, made first where it is not there."""
        name = method.lower().replace(" + ", "-").replace(", ", "-").replace(" ", "-")
        weights, said, ranks = (self._folder / f"{name}.{end}" for end in ("packed", "json", "ranks"))
        if not said.is_file():
            self._say(f"{method}: training" if self._epochs else f"{method}: random weights")
            self._under, self._training = name, []
            ranker, grids = make()
            packed.write(
                weights, ranker.state_dict(), {f"{module}.weight": grid for module, grid in grids.items()}
            )
            if self._epochs:
                self._of_log().ranks(load(weights, config)).save(ranks)
            kept = {"grids": {module: [grid.bits, grid.per_row] for module, grid in grids.items()}}
            write_whole(said, json.dumps(kept, indent=1).encode())
            for folder in self._training:
                shutil.rmtree(folder)
        stored = json.loads(said.read_bytes())
        ranker = load(weights, config)
        with torch.device("meta"):
            whole = count(CandidateRanker(RetrievalNetwork(self._shape.config(self._rows))))
        gone = whole - count(ranker) + sum(int((p == 0).sum()) for p in pruning.prunable(ranker).values())
        return Made(
            method,
            ranker,
            {module: Grid(bits, per_row) for module, (bits, per_row) in stored["grids"].items()},
            weights.stat().st_size,
            count(ranker),
            gone / whole,
            Ranks.load(ranks) if ranks.is_file() else None,
        )

    def _fit(
        self,
        ranker: CandidateRanker,
        part: float,
        effort: Effort,
        *,
        teacher: CandidateRanker | None = None,
        beside: Sequence[CandidateRanker] = (),
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        if not self._epochs:
            return
        effort = replace(effort, epochs=self._epochs * part)
        folder = self._folder / f"{self._under}-{len(self._training) + 1}"
        folder.mkdir(exist_ok=True)
        self._training.append(folder)
        steps = fit(
            ranker,
            self._of_log(),
            effort,
            teacher=teacher,
            beside=beside,
            after_step=after_step,
            progress=Progress(self._say),
            seed=self._seed,
            checkpoints=Checkpoints(folder, f"{effort} seed {self._seed}"),
        )
        self._say(f"  {steps} steps")

    def _of_log(self) -> Data:
        if self._data is None:
            self._data = data(self._shape, self._seed, self._log)
        return self._data

    def _count_rows(self) -> int:
        """A log may lack items of its world; once known, the rows are kept with the rest."""
        known = self._folder / "rows"
        if not known.is_file():
            write_whole(known, str(self._of_log().vocabulary.item_rows).encode())
        return int(known.read_text())


def newest(sequences: Sequences, count: int) -> Sequences:
    """Each user's last `count` events."""
    ends, starts = sequences.offsets[1:], sequences.offsets[:-1]
    starts = np.maximum(starts, ends - count)
    kept = sequences.windows(starts, ends)
    return Sequences(
        users=sequences.users,
        offsets=np.append(0, np.cumsum(kept.lengths)),
        items=kept.items,
        categories=kept.categories,
        behaviors=kept.behaviors,
        timestamps=kept.timestamps,
    )


def data(shape: Shape, seed: int, log: Path | None = None, **judging: Any) -> Data:
    """A log, or a synthetic one in Taobao's format that is read as any other: of each user's events the
    newest that fill a history, and the two that follow. Where nobody comes back to an item, as in lists of
    films, what was seen is not ranked."""
    if log is not None:
        sequences = read_log(log).sequences
    else:
        with tempfile.TemporaryDirectory(prefix="tailrace-synth-") as folder:
            path = Path(folder) / "log.csv"
            settings = SynthSettings(
                events=shape.log_events,
                users=shape.log_users,
                items=shape.items,
                categories=shape.log_categories,
                seed=seed,
            )
            write_log(path, synthesize(settings))
            sequences = read_log(path).sequences
    sequences = newest(sequences, shape.history + 3)
    vocabulary = build_vocabulary(
        sequences, max_items=max(shape.items, MOST_ITEMS), item_buckets=1, category_buckets=2
    )
    once = log is not None and is_item_lists(log)
    split = split_sequences(sequences, "leave-one-out")
    return Data(sequences, split, vocabulary, filter_seen=once, **judging)


def grids_of(ranker: CandidateRanker, table: Grid) -> dict[str, Grid]:
    """8 bits per row for every linear map of the layers, and the table's own grid."""
    linear = {
        name: EIGHT
        for name, module in ranker.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("network.layers")
    }
    return linear | {TABLE: table}
