"""What a search found, as a table, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from compression.ranking.judging import OVER, Data, losses
from compression.ranking.network import CandidateRanker
from infra.bench import report
from infra.tuning.study import Search


def trials_of(search: Search) -> list[dict[str, Any]]:
    """Every trial that was tried: its recipe, its figures and how it ended."""
    front = {trial.number for trial in search.front}
    return [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "front": trial.number in front,
            **trial.user_attrs,
        }
        for trial in search.study.get_trials(deepcopy=False)
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    ]


def front_of(search: Search, whole: CandidateRanker, test: Data) -> list[dict[str, Any]]:
    """The networks of the front, judged by what no trial was chosen by."""
    base = test.ranks(whole)
    found = []
    for trial in search.front:
        ranks = test.ranks(search.network_of(trial))
        found.append(
            {
                "number": trial.number,
                **trial.user_attrs,
                "test": ranks.metrics(),
                "test_loss": losses(ranks, base, OVER),
            }
        )
    return found


def chosen(front: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the front the trial whose latency and size, as shares, have the least product."""
    return min(front, key=lambda one: one["latency_share"] * one["size_share"], default=None)


def show(front: Sequence[dict[str, Any]], *, title: str) -> None:
    report.table(
        title,
        ["recipe", "latency", "size", "validation, lost", "test HR@50, lost", "test NDCG@50, lost"],
        [
            [
                words(one["recipe"]),
                f"{one['latency_share']:.1%}",
                f"{one['size_share']:.1%}",
                _lost(one["loss"]),
                _lost(one["test_loss"]["hr@50"]),
                _lost(one["test_loss"]["ndcg@50"]),
            ]
            for one in front
        ],
    )


def words(recipe: dict[str, Any]) -> str:
    """In a line, as "shrunk 2x3/192, zeros 40 %, 8/5 bits"."""
    parts = [f"{recipe['kind']} {recipe['layers']}x{recipe['heads']}/{recipe['channels']}"]
    if recipe["kind"] == "student":
        parts.append(f"d = {recipe['dim']}")
    if recipe["zeros"]:
        parts.append(f"zeros {recipe['zeros']:.0%}")
    if recipe["rank"]:
        parts.append(f"rank {recipe['rank']}")
    if recipe["distinct"]:
        parts.append(f"{recipe['distinct']} distinct")
    if recipe["splits"]:
        return ", ".join([*parts, f"{recipe['splits']} codes a row", f"{recipe['matrix_bits']} bits"])
    return ", ".join([*parts, f"{recipe['matrix_bits']}/{recipe['table_bits']} bits"])


def _lost(loss: dict[str, float]) -> str:
    return f"{loss['loss']:+.1%} [{100 * loss['low']:+.1f}, {100 * loss['high']:+.1f}]"


def draw(trials: Sequence[dict[str, Any]], path: Path, *, limit: float) -> None:
    """Latency by size of every trial, and the front; what was beaten before it was taught is a point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def within(one: dict[str, Any]) -> bool:
        return bool(one["state"] == "complete" and one["loss"]["loss"] <= limit)

    groups = {
        f"within {limit:.1%}": (within, "o", "#4c78a8"),
        "lost more": (lambda one: "loss" in one and not within(one), "x", "#e45756"),
        "beaten, not taught": (lambda one: "loss" not in one, ".", "#b0b0b0"),
    }
    drawn, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for label, (belongs, marker, colour) in groups.items():
        some = [one for one in trials if belongs(one)]
        axis.scatter(
            [100 * one["latency_share"] for one in some],
            [100 * one["size_share"] for one in some],
            marker=marker,
            color=colour,
            label=label,
        )
    front = sorted((one["latency_share"], one["size_share"]) for one in trials if one["front"])
    axis.plot([100 * x for x, _ in front], [100 * y for _, y in front], color="#4c78a8", linewidth=1)
    axis.set(xlim=(0, None), ylim=(0, None))
    axis.set_xlabel("latency, % of the whole network's")
    axis.set_ylabel("stored bytes, %")
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path)
    pyplot.close(drawn)
