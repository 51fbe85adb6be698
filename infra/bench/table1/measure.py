"""Graphs of every method in both forms, and of the network that is served, timed in turn."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import torch

from compression.ranking.graph import FORMS, graph
from infra.bench.child import started
from infra.bench.table1.arm import Arm, Feed, serve
from infra.bench.table1.shapes import Shape
from infra.bench.table1.steps import Made

SERVED: Final = "Served default"
TOLERANCE: Final = 1e-3  # of scores in full precision, against torch
_REQUESTS: Final = 4


@dataclass(slots=True)
class Row:
    """What one arm showed. Memory is what the model added to a process that had its runtime loaded."""

    method: str
    form: str
    latencies_s: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    memory_mib: float = 0.0
    peak_mib: float = 0.0
    difference: float = float("nan")

    @property
    def p50_ms(self) -> float:
        return float(np.percentile(self.latencies_s, 50)) * 1e3

    @property
    def p99_ms(self) -> float:
        return float(np.percentile(self.latencies_s, 99)) * 1e3

    @property
    def per_s(self) -> float:
        return float(np.median(self.rates))


def arms(
    made: Sequence[Made], shape: Shape, folder: Path, *, threads: int, workers: int, seed: int
) -> list[Arm]:
    """Every method's graph in both forms, written to the folder; the served network's too."""
    rng = np.random.default_rng(seed)
    items = made[0].ranker.network.config.item_rows - 1  # a log may lack some of the shape's
    feeds = tuple(
        {
            "items": rng.integers(1, items, shape.history).astype(np.int32),
            "candidates": rng.choice(np.arange(1, items), shape.candidates, False).astype(np.int32),
        }
        for _ in range(_REQUESTS)
    )
    found = []
    for one in made:
        for form in FORMS:
            path = folder / f"{one.method}-{form}.onnx".lower().replace(" ", "-")
            model = graph(
                one.ranker, form, events=shape.history, candidates=shape.candidates, grids=one.grids
            )
            path.write_bytes(model.SerializeToString())
            found.append(Arm(one.method, form, path, feeds, threads, workers))
    return [*found, served(shape, folder, feeds, threads=threads, workers=workers)]


def served(shape: Shape, folder: Path, feeds: Sequence[Feed], *, threads: int, workers: int) -> Arm:
    """The network that `tailrace retrain` trains, with as many items: its graph `rank`."""
    from compression.releases.registry import ModelShape
    from compression.training.export import GRAPHS, export
    from compression.training.model import Recommender
    from compression.training.train import RECIPES

    recipe = RECIPES["full"]
    torch.manual_seed(0)
    network = Recommender(
        ModelShape(
            dim=recipe.dim,
            layers=recipe.layers,
            heads=recipe.heads,
            ffn=recipe.ffn,
            max_history=max(recipe.max_history, shape.history),
            item_rows=1 + shape.items + recipe.item_buckets,
            category_rows=1 + shape.log_categories + recipe.category_buckets,
        )
    ).eval()
    export(network, folder)
    given = tuple(
        {
            "items": feed["items"][None],
            "categories": np.ones((1, shape.history), np.int32),
            "behaviors": np.ones((1, shape.history), np.int32),
            "gaps": np.ones((1, shape.history), np.int32),
            "lengths": np.array([shape.history], np.int32),
            "candidates": feed["candidates"][None],
            "candidate_categories": np.ones((1, shape.candidates), np.int32),
        }
        for feed in feeds
    )
    path = folder / GRAPHS["rank"]
    return Arm(SERVED, "shared history", path, given, threads, workers)


def run(found: Sequence[Arm], *, rounds: int, seconds: float) -> tuple[list[Row], dict[str, Any]]:
    """All loaded, then in turn, round by round: each takes its times while the others wait. Rows, and the
    scores that each arm gave."""
    rows = [Row(arm.method, arm.form) for arm in found]
    scores: dict[str, Any] = {}
    with ExitStack() as stack:
        pipes = []
        for arm, row in zip(found, rows, strict=True):
            pipe = stack.enter_context(started(serve, arm))
            said = _said(pipe, arm)
            row.memory_mib, row.peak_mib = round(said["memory_mib"], 1), round(said["peak_mib"], 1)
            scores[f"{arm.method}, {arm.form}"] = said["scores"]
            pipes.append(pipe)
        for _ in range(rounds):
            for what in ("latency", "throughput"):
                for arm, row, pipe in zip(found, rows, pipes, strict=True):
                    pipe.send((what, seconds))
                    if what == "latency":
                        row.latencies_s += _said(pipe, arm)
                    else:
                        row.rates.append(_said(pipe, arm))
        for pipe in pipes:
            pipe.send(None)
    return rows, scores


def compare(rows: Sequence[Row], made: Sequence[Made], scores: dict[str, Any], found: Sequence[Arm]) -> None:
    """How far each arm's scores are from its network's in torch, in units of how much these differ."""
    rankers = {one.method: one.ranker for one in made}
    for row, arm in zip(rows, found, strict=True):
        ranker = rankers.get(arm.method)
        if ranker is None:
            continue
        theirs = np.stack(scores[f"{arm.method}, {arm.form}"])
        ours = np.stack([_in_torch(ranker, feed) for feed in arm.feeds])
        row.difference = float(np.abs(theirs - ours).max() / ours.std())


def _in_torch(ranker: Any, feed: Feed) -> Any:
    from compression.training.model import History

    items = torch.from_numpy(feed["items"]).long()[None]
    nothing = torch.zeros_like(items)
    asked = torch.from_numpy(feed["candidates"]).long()[None]
    length = torch.tensor([items.shape[1]])
    with torch.inference_mode():
        history = History(items, nothing, nothing, nothing, length)
        return ranker(history, asked, length[:, None].expand_as(asked))[1][0].numpy()


def _said(pipe: Connection, arm: Arm) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise click.ClickException(f"the process of {arm.method}, {arm.form}, ended early") from None
