"""`tailrace bench attention`: every way to attend beside what its formula predicts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from compression.attention.variants import Variant, all_variants
from compression.ranking.descent import Effort
from compression.ranking.training import fit_retrieval
from compression.retrieval.network import NetworkConfig, RetrievalNetwork
from infra.bench import options as bench_options
from infra.bench import report
from infra.bench.table1.shapes import SHAPES
from infra.bench.table1.steps import data


@dataclass(slots=True)
class Row:
    """One variant: counted and timed, and what was foretold. Latency is of one layer's attention alone."""

    name: str
    parameters: int
    foretold_parameters: int
    flops: int
    foretold_flops: int
    took_s: list[float] = field(default_factory=list)
    accuracy: dict[str, float] = field(default_factory=dict)
    steps: int = 0

    @property
    def p50_ms(self) -> float:
        return float(np.median(self.took_s)) * 1e3


def measure(variants: Sequence[Variant], config: NetworkConfig, *, batch: int, rounds: int) -> list[Row]:
    """Parameters and work of one layer's attention on one history, and the time of a batch, in turn."""
    torch.manual_seed(0)
    x = torch.randn(batch, config.max_history, config.dim)
    modules = [variant.build(config).eval() for variant in variants]
    rows = []
    for variant, module in zip(variants, modules, strict=True):
        with FlopCounterMode(display=False) as counter:
            module(x[:1])
        rows.append(
            Row(
                variant.name,
                sum(parameter.numel() for parameter in module.parameters()),
                variant.parameters(config),
                counter.get_total_flops(),
                variant.flops(config, config.max_history),
            )
        )
    with torch.inference_mode():
        for number in range(rounds + 1):
            for row, module in zip(rows, modules, strict=True):
                started = time.perf_counter()
                module(x)
                if number:  # the first is for warming up
                    row.took_s.append(time.perf_counter() - started)
    return rows


def learn(rows: Sequence[Row], variants: Sequence[Variant], *, shape: str, epochs: float, seed: int) -> None:
    """Train a small network with each variant for as many epochs of the same log."""
    sizes = SHAPES[shape]
    log = data(sizes, seed)
    config = NetworkConfig(
        dim=sizes.dim,
        heads=sizes.heads,
        ffn=sizes.ffn,
        layers=2,
        activation="relu",
        max_history=sizes.history,
        item_rows=log.vocabulary.item_rows,
    )
    for row, variant in zip(rows, variants, strict=True):
        torch.manual_seed(seed)
        network = RetrievalNetwork(config, variant.build)
        row.steps = fit_retrieval(network, log, Effort(epochs=epochs), seed=seed)
        row.accuracy = log.judge_retrieval(network)


def show(rows: Sequence[Row], *, title: str) -> None:
    """Shares are of full attention's."""
    full = rows[0]
    report.table(
        title,
        ["attention", "parameters", "foretold", "MFLOP", "foretold", "", "p50 ms", "", "HR@50", "NDCG@50"],
        [
            [
                row.name,
                f"{row.parameters:,}",
                f"{row.foretold_parameters:,}",
                f"{row.flops / 1e6:.2f}",
                f"{row.foretold_flops / 1e6:.2f}",
                f"{row.foretold_flops / full.foretold_flops:.0%}",
                f"{row.p50_ms:.2f}",
                f"{row.p50_ms / full.p50_ms:.0%}",
                *(f"{row.accuracy[name]:.4f}" if row.accuracy else "" for name in ("hr@50", "ndcg@50")),
            ]
            for row in rows
        ],
    )


def _kept(row: Row, full: Row) -> dict[str, Any]:
    """A row as JSON, shares of full attention's among its figures."""
    return {
        **{name: figure for name, figure in asdict(row).items() if name != "took_s"},
        "p50_ms": round(row.p50_ms, 3),
        "foretold_share": round(row.foretold_flops / full.foretold_flops, 4),
        "time_share": round(row.p50_ms / full.p50_ms, 4),
    }


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=30, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=50, show_default=True, help="Histories at a time.")
@click.option("--threads", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option(
    "--epochs",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Of a synthetic log, to train each for; 0: no accuracy.",
)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="small", show_default=True, help="Trained.")
@bench_options.seed
@bench_options.json_path
def attention(
    *, rounds: int, batch: int, threads: int, epochs: float, shape: str, seed: int, json_path: Path | None
) -> None:
    """Lightweight attention: parameters, work, time and NDCG@50 beside what the formulas say.

    Sizes are those of Table I: 160 dimensions in 5 heads, 100 events. Accuracy is of two layers in the
    small shape, each trained for as many epochs.

    \b
    tailrace bench attention
    tailrace bench attention --epochs 4
    """
    torch.set_num_threads(threads)
    variants = all_variants()
    full = SHAPES["full"]
    config = NetworkConfig(
        dim=full.dim, heads=full.heads, ffn=full.ffn, max_history=full.history, dropout=0.0, item_rows=2
    )
    rows = measure(variants, config, batch=batch, rounds=rounds)
    if epochs:
        learn(rows, variants, shape=shape, epochs=epochs, seed=seed)
    show(
        rows,
        title=f"attention: d = {full.dim}, {full.heads} heads, {full.history} events, batches of {batch}, "
        f"{threads} thread{'s' * (threads > 1)}",
    )
    report.write(
        json_path,
        "attention",
        {
            "config": config.model_dump(),
            "batch": batch,
            "threads": threads,
            "epochs": epochs,
            "shape": shape,
            "seed": seed,
            "rows": [_kept(row, rows[0]) for row in rows],
        },
    )
