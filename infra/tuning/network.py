"""A network by a recipe: made from a trained one, stored, its size and its time beside the trained one's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor, nn

from compression.attention.full import FullAttention
from compression.errors import ArtefactInvalid
from compression.ranking.descent import FROM_SCRATCH, TUNING
from compression.ranking.graph import Form, graph
from compression.ranking.judging import Data
from compression.ranking.network import CandidateRanker
from compression.ranking.training import fit
from compression.ranking.weights import TABLE, copy, narrow_table, untrained
from compression.retrieval.network import Layer
from compression.smaller import packed, product_codes, pruning, structured
from compression.smaller.quantization import Grid, aware
from infra.tuning.recipe import Recipe

_TIMED: Final = 15
Grids = dict[str, Grid]
Run = Callable[[], Any]


def begin(recipe: Recipe, whole: CandidateRanker, seed: int) -> CandidateRanker:
    """The recipe's network before it is rounded and taught."""
    ranker = _student(recipe, whole, seed) if recipe.kind == "student" else _shrunk(recipe, whole)
    if recipe.splits:
        coded = product_codes.from_table(ranker.network.items.weight, recipe.splits)
        ranker.network.items = cast(nn.Embedding, coded)  # which it stands in for
    else:
        pruning.apply(ranker, masks(recipe, ranker))
    return ranker


def _student(recipe: Recipe, whole: CandidateRanker, seed: int) -> CandidateRanker:
    sizes = {"dim": recipe.dim, "layers": recipe.layers, "heads": recipe.heads, "ffn": recipe.channels}
    student = untrained(whole.network.config.model_copy(update=sizes), seed)
    narrow_table(student, whole)
    return student


def _shrunk(recipe: Recipe, whole: CandidateRanker) -> CandidateRanker:
    ranker = copy(whole)
    network = ranker.network
    every = len(network.layers) / recipe.layers
    # The last layer stays: the user vector leaves from it.
    kept = [network.layers[round((number + 1) * every) - 1] for number in range(recipe.layers)]
    network.layers = nn.ModuleList(kept)
    structured.shrink(network, heads=recipe.heads, channels=recipe.channels)
    if recipe.rank:
        for layer in cast(list[Layer], list(network.layers)):
            attention = cast(FullAttention, layer.attention)
            for name in ("query", "key", "value"):
                setattr(attention, name, structured.factorised(getattr(attention, name), recipe.rank))
    if recipe.distinct:
        structured.share_layers(network, recipe.distinct)
    return ranker


def masks(recipe: Recipe, ranker: CandidateRanker) -> dict[str, Tensor]:
    """What of the table stays."""
    table = ranker.network.items.weight
    return {f"{TABLE}.weight": pruning.mask(table, pruning.threshold(table, recipe.zeros))}


def grids(recipe: Recipe, ranker: CandidateRanker) -> Grids:
    """By module, under every name that it has: layers may share theirs."""
    linear = {
        name: Grid(recipe.matrix_bits, per_row=True)
        for name, module in ranker.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and name.startswith("network.layers")
    }
    return linear if recipe.splits else linear | {TABLE: Grid(recipe.table_bits, per_row=True)}


def _once(ranker: CandidateRanker, chosen: Grids) -> Grids:
    """Of the names of a module that layers share, the first."""
    names = {name for name, _ in ranker.named_modules()}
    return {name: grid for name, grid in chosen.items() if name in names}


def teach(
    recipe: Recipe, ranker: CandidateRanker, whole: CandidateRanker, data: Data, *, epochs: float, seed: int
) -> None:
    """Some epochs by what the whole network says, rounded; what is zero stays zero."""
    kept = {name: weight.detach() != 0 for name, weight in ranker.named_parameters() if TABLE in name}
    effort = replace(FROM_SCRATCH if recipe.kind == "student" else TUNING, epochs=epochs)
    with aware(ranker, _once(ranker, grids(recipe, ranker))):
        fit(ranker, data, effort, teacher=whole, after_step=lambda: pruning.apply(ranker, kept), seed=seed)


def store(recipe: Recipe, ranker: CandidateRanker, path: Path) -> int:
    """The bytes of the stored network."""
    chosen = {f"{name}.weight": grid for name, grid in grids(recipe, ranker).items()}
    return packed.write(path, _tensors(ranker), chosen)


@torch.no_grad()
def load(recipe: Recipe, whole: CandidateRanker, path: Path) -> CandidateRanker:
    ranker = begin(recipe, whole, seed=0)
    stored, own = packed.read(path), _tensors(ranker)
    if stored.keys() != own.keys():
        raise ArtefactInvalid(f"{path.name} is not of this recipe: delete its folder to search anew")
    for name, tensor in own.items():
        tensor.copy_(stored[name])
    return ranker.eval()


def _tensors(ranker: CandidateRanker) -> dict[str, Tensor]:
    """Weights and codes by name; what layers share once."""
    return dict(ranker.named_parameters()) | dict(ranker.named_buffers())


class Stopwatch:
    """Times graphs in ONNX Runtime on one thread, in turn with the whole network's."""

    def __init__(self, whole: CandidateRanker, form: Form, candidates: int, seed: int) -> None:
        self._form: Form = form
        self._events = whole.network.config.max_history - 1
        rows = np.arange(1, whole.network.config.item_rows - 1)
        rng = np.random.default_rng(seed)
        self._feed = {
            "items": rng.choice(rows, self._events).astype(np.int32),
            "candidates": rng.choice(rows, candidates, len(rows) < candidates).astype(np.int32),
        }
        self._whole = self._ready(whole, {})

    def share(self, ranker: CandidateRanker, chosen: Grids) -> tuple[float, float]:
        """The median of the time beside the whole network's, and that time in milliseconds."""
        other = self._ready(ranker, chosen)
        times = np.array([(_seconds(self._whole), _seconds(other)) for _ in range(_TIMED)])
        return float(np.median(times[:, 1] / times[:, 0])), float(np.median(times[:, 1])) * 1e3

    def _ready(self, ranker: CandidateRanker, chosen: Grids) -> Run:
        import onnxruntime

        candidates = len(self._feed["candidates"])
        model = graph(ranker, self._form, events=self._events, candidates=candidates, grids=chosen)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

        def run() -> Any:
            return session.run(["scores"], self._feed)

        run()
        return run


def _seconds(run: Run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
