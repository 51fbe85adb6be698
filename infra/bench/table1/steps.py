"""Train, prune, quantize, distil: steps that each leave a packed file and their figures behind.

A step whose files are there is not taken again, so a run that was stopped goes on, and a run after a whole
one only measures. Without minutes to train nothing is learned: weights are random, and accuracy is left
open.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from compression.files import write_whole
from compression.logs.dataset import build_vocabulary, read_log
from compression.logs.dataset import split as split_sequences
from compression.logs.synth import SynthSettings, synthesize, write_log
from compression.ranking.network import CandidateRanker
from compression.ranking.training import Data, Effort, fit
from compression.retrieval.network import NetworkConfig, RetrievalNetwork
from compression.smaller import packed, pruning, structured
from compression.smaller.quantization import Grid, aware
from infra.bench.table1.shapes import EIGHT, Shape, untrained

Say = Callable[[str], None]
METHODS: Final = ("Baseline", "Quantized", "Pruned", "Pruned + Quantized", "Distilled")
TABLE: Final = "network.items"


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """One method's network as it is stored and loaded again. `grids` by module: what its graph computes
    with; `zeros`: the share of the Baseline's parameters that are gone or zero."""

    method: str
    ranker: CandidateRanker
    grids: dict[str, Grid]
    bytes: int
    parameters: int
    zeros: float
    figures: dict[str, Any]


class Steps:
    """The steps of one shape, in one folder. `minutes` is the Baseline's training; the others' are parts
    of it."""

    def __init__(
        self, shape: Shape, folder: Path, minutes: float, seed: int, say: Say = lambda _: None
    ) -> None:
        self._shape, self._folder, self._minutes, self._seed, self._say = shape, folder, minutes, seed, say
        self._data: Data | None = None
        self._rows = shape.items + 2

    def all(self) -> list[Made]:
        """Every method, in the order of Table I."""
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        if self._minutes:
            self._rows = self._count_rows()
        baseline = self._step("Baseline", self._baseline, self._shape.config(self._rows))
        quantized = self._step("Quantized", lambda: self._quantized(baseline), baseline.ranker.network.config)
        pruned = self._step("Pruned", lambda: self._pruned(baseline), baseline.ranker.network.config)
        both = self._step(
            "Pruned + Quantized", lambda: self._pruned_quantized(pruned), baseline.ranker.network.config
        )
        distilled = self._step(
            "Distilled", lambda: self._distilled(baseline), self._shape.student(self._rows)
        )
        return [baseline, quantized, pruned, both, distilled]

    # Steps: each answers a network and the grids it is to be stored on ---------------------------

    def _baseline(self) -> tuple[CandidateRanker, dict[str, Grid]]:
        ranker = untrained(self._shape.config(self._rows), self._seed)
        self._fit(ranker, 1.0)
        return ranker, {}

    def _quantized(self, baseline: Made) -> tuple[CandidateRanker, dict[str, Grid]]:
        return self._rounded(baseline.ranker, EIGHT)

    def _pruned(self, baseline: Made) -> tuple[CandidateRanker, dict[str, Grid]]:
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
            self._fit(ranker, 0.2, after_step=lambda kept=masks: pruning.apply(ranker, kept))  # type: ignore[misc]
        return ranker, {}

    def _masks(self, ranker: CandidateRanker, share: float, of: int) -> dict[str, torch.Tensor]:
        """Masks of the table with which that share of `of` parameters is gone or zero."""
        gone = of - count(ranker)
        table = ranker.network.items.weight
        left = max(0.0, (share * of - gone) / table.numel())
        return {f"{TABLE}.weight": pruning.mask(table, pruning.threshold(table, left))}

    def _pruned_quantized(self, pruned: Made) -> tuple[CandidateRanker, dict[str, Grid]]:
        return self._rounded(pruned.ranker, Grid(self._shape.pruned_bits, per_row=True))

    def _distilled(self, baseline: Made) -> tuple[CandidateRanker, dict[str, Grid]]:
        """From the teacher's table in fewer dimensions, by its maps and opinions, then rounded."""
        student = untrained(self._shape.student(self._rows), self._seed + 1)
        narrow_table(student, baseline.ranker)
        self._fit(student, 1.5, teacher=baseline.ranker)
        return self._rounded(student, Grid(self._shape.student_bits, per_row=True), baseline.ranker)

    def _rounded(
        self, ranker: CandidateRanker, table: Grid, teacher: CandidateRanker | None = None
    ) -> tuple[CandidateRanker, dict[str, Grid]]:
        """Quantization-aware training of a copy; what is zero stays zero."""
        ranker = copy(ranker)
        grids = grids_of(ranker, table)
        zero = {name: weight.detach() != 0 for name, weight in pruning.prunable(ranker).items()}
        kept = {name: mask for name, mask in zero.items() if name.startswith(TABLE)}
        with aware(ranker, grids):
            self._fit(ranker, 0.25, teacher=teacher, after_step=lambda: pruning.apply(ranker, kept))
        return ranker, grids

    # ------------------------------------------------------------------------------------------

    def _step(
        self, method: str, make: Callable[[], tuple[CandidateRanker, dict[str, Grid]]], config: NetworkConfig
    ) -> Made:
        """What is stored of the method, made first where it is not there."""
        name = method.lower().replace(" + ", "-")
        weights, said = self._folder / f"{name}.packed", self._folder / f"{name}.json"
        if not said.is_file():
            self._say(f"{method}: training" if self._minutes else f"{method}: random weights")
            ranker, grids = make()
            packed.write(
                weights, ranker.state_dict(), {f"{module}.weight": grid for module, grid in grids.items()}
            )
            stored = load(weights, config)
            figures: dict[str, Any] = {"grids": {m: [g.bits, g.per_row] for m, g in grids.items()}}
            if self._minutes:
                figures["accuracy"] = self._of_log().judge(stored)
                if method == "Baseline":
                    figures["trained_on"] = self._trained_on(stored)
            write_whole(said, json.dumps(figures, indent=1).encode())
        figures = json.loads(said.read_bytes())
        ranker = load(weights, config)
        with torch.device("meta"):
            whole = count(CandidateRanker(RetrievalNetwork(self._shape.config(self._rows))))
        gone = whole - count(ranker) + sum(int((p == 0).sum()) for p in pruning.prunable(ranker).values())
        return Made(
            method,
            ranker,
            {module: Grid(bits, per_row) for module, (bits, per_row) in figures.pop("grids").items()},
            weights.stat().st_size,
            count(ranker),
            gone / whole,
            figures,
        )

    def _trained_on(self, baseline: CandidateRanker) -> dict[str, float]:
        """The Baseline's accuracy after as much more training as the others get at most: what they have
        lost is counted from there, or training on would pass for compression."""
        ranker = copy(baseline)
        self._fit(ranker, 0.2 * self._shape.rounds + 0.25)
        return self._of_log().judge(ranker)

    def _fit(
        self,
        ranker: CandidateRanker,
        part: float,
        *,
        teacher: CandidateRanker | None = None,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        if not self._minutes:
            return
        rate = 1e-3 if part >= 1.0 else 5e-4
        effort = Effort(minutes=self._minutes * part, learning_rate=rate)
        steps = fit(ranker, self._of_log(), effort, teacher=teacher, after_step=after_step, seed=self._seed)
        self._say(f"  {steps} steps")

    def _of_log(self) -> Data:
        if self._data is None:
            self._data = data(self._shape, self._seed)
        return self._data

    def _count_rows(self) -> int:
        """A log may lack items of its world; once known, the rows are kept with the rest."""
        known = self._folder / "rows"
        if not known.is_file():
            write_whole(known, str(self._of_log().vocabulary.item_rows).encode())
        return int(known.read_text())


def data(shape: Shape, seed: int) -> Data:
    """A synthetic log in Taobao's format, read as any other."""
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
    vocabulary = build_vocabulary(sequences, max_items=shape.items, item_buckets=1, category_buckets=2)
    return Data(sequences, split_sequences(sequences, "leave-one-out"), vocabulary)


def grids_of(ranker: CandidateRanker, table: Grid) -> dict[str, Grid]:
    """8 bits per row for every linear map of the layers, and the table's own grid."""
    linear = {
        name: EIGHT
        for name, module in ranker.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("network.layers")
    }
    return linear | {TABLE: table}


@torch.no_grad()
def narrow_table(student: CandidateRanker, teacher: CandidateRanker) -> None:
    """Let the student's table begin as the teacher's in its directions of most variance."""
    table = teacher.network.items.weight
    _, _, directions = torch.linalg.svd(table.T @ table)
    student.network.items.weight.copy_(table @ directions[: student.network.config.dim].T)


def load(path: Path, config: NetworkConfig) -> CandidateRanker:
    """A stored ranker; its layers may be smaller than the configuration says."""
    weights = packed.read(path)
    ranker = CandidateRanker(RetrievalNetwork(config))
    own = {name.removeprefix("network."): one for name, one in weights.items() if name.startswith("network.")}
    structured.fit_to(ranker.network, own)
    ranker.load_state_dict(weights)
    return ranker.eval()


def copy(ranker: CandidateRanker) -> CandidateRanker:
    weights: Mapping[str, torch.Tensor] = ranker.state_dict()
    made = CandidateRanker(RetrievalNetwork(ranker.network.config))
    own = {name.removeprefix("network."): one for name, one in weights.items() if name.startswith("network.")}
    structured.fit_to(made.network, own)
    made.load_state_dict(weights)
    return made


def count(ranker: CandidateRanker) -> int:
    return sum(parameter.numel() for parameter in ranker.parameters())
