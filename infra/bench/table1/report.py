"""What was measured, as tables beside the paper's and as its figures 5 to 7."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from compression.ranking.judging import losses
from infra.bench import report
from infra.bench.table1.measure import SERVED, Row
from infra.bench.table1.steps import Made

# Table I: parameters in millions, MB, CPU ms, CPU requests per second.
PAPER: Final = {
    "Baseline": (32.0, 128.0, 120.7, 80),
    "Quantized": (32.0, 32.0, 102.3, 95),
    "Pruned": (19.2, 76.8, 88.5, 110),
    "Pruned + Quantized": (19.2, 19.2, 74.2, 140),
    "Distilled": (6.4, 12.8, 54.8, 180),
}


def rows_of(rows: Sequence[Row], made: Sequence[Made]) -> list[dict[str, Any]]:
    """All figures of every arm, with what they are beside the Baseline's, each candidate with its copy."""
    stored = {one.method: one for one in made}
    base = next(row for row in rows if row.method == "Baseline" and row.form == "per candidate")
    found = []
    for row in rows:
        one = stored.get(row.method)
        whole = stored["Baseline"].bytes
        figures: dict[str, Any] = {
            "method": row.method,
            "form": row.form,
            "runtime": "onnxruntime",
            "requests": len(row.latencies_s),
            "p50_ms": round(row.p50_ms, 3),
            "p99_ms": round(row.p99_ms, 3),
            "per_s": round(row.per_s, 1),
            "latency_share": round(row.p50_ms / base.p50_ms, 4),
            "throughput_times": round(row.per_s / base.per_s, 2),
            "memory_mib": row.memory_mib,
            "peak_mib": row.peak_mib,
            "memory_share": round(row.memory_mib / base.memory_mib, 4),
        }
        if one is not None:
            figures |= {
                "parameters": one.parameters,
                "not_zero": round((1 - one.zeros) * stored["Baseline"].parameters),
                "gone_or_zero": round(one.zeros, 4),
                "bytes": one.bytes,
                "size_share": round(one.bytes / whole, 4),
                "difference_to_torch": row.difference,
            }
        if row.method in PAPER and row.form == "per candidate":
            figures["paper_latency_share"] = round(PAPER[row.method][2] / PAPER["Baseline"][2], 4)
            figures["paper_throughput_times"] = round(PAPER[row.method][3] / PAPER["Baseline"][3], 2)
            figures["paper_size_share"] = round(PAPER[row.method][1] / PAPER["Baseline"][1], 4)
        found.append(figures)
    return found


def show(figures: Sequence[dict[str, Any]], *, title: str) -> None:
    """A line per arm; shares and multiples are of the Baseline, each candidate with its copy."""
    report.table(
        title,
        [
            "method, history",
            "M",
            "gone",
            "MB",
            "",
            "p50 ms",
            "p99",
            "",
            "paper",
            "/s",
            "×",
            "paper",
            "MiB",
            "",
        ],
        [_cells(one) for one in figures],
    )


def _cells(one: dict[str, Any]) -> list[str]:
    name = one["method"] if one["method"] == SERVED else f"{one['method']}, {one['form'].split()[0]}"
    sizes = ["", "", "", ""]
    if "bytes" in one:
        sizes = [
            f"{one['not_zero'] / 1e6:.1f}",
            f"{one['gone_or_zero']:.0%}",
            f"{one['bytes'] / 1e6:.1f}",
            f"{one['size_share']:.1%}",
        ]
    return [
        name,
        *sizes,
        f"{one['p50_ms']:.2f}",
        f"{one['p99_ms']:.2f}",
        f"{one['latency_share']:.1%}",
        f"{one['paper_latency_share']:.0%}" if "paper_latency_share" in one else "",
        f"{one['per_s']:,.1f}",
        f"{one['throughput_times']:.1f}",
        f"{one['paper_throughput_times']:.2f}" if "paper_throughput_times" in one else "",
        f"{one['memory_mib']:.0f}",
        f"{one['memory_share']:.0%}",
    ]


def accuracy_of(made: Sequence[Made], trained_on: Made) -> list[dict[str, Any]]:
    """Accuracy of every method, and which share of the Baseline's it lost, of the Baseline's trained on as
    long too, each with the interval of a paired bootstrap over users."""
    base = made[0].ranks
    further = trained_on.ranks
    if base is None or further is None:
        return []
    return [
        {
            "method": one.method,
            "gone_or_zero": round(one.zeros, 4),
            "bytes": one.bytes,
            **one.ranks.metrics(),
            "loss": losses(one.ranks, base),
            "loss_to_trained_on": losses(one.ranks, further),
        }
        for one in (made[0], trained_on, *made[1:])
        if one.ranks is not None
    ]


def show_accuracy(found: Sequence[dict[str, Any]], *, title: str) -> None:
    """Changes in percent of the Baseline's; where 95 % of bootstraps lie for two of them."""
    report.table(
        title,
        ["method", "HR@50", "change", "NDCG@50", "change", "of trained on", "MRR", "", "NDCG@10 of 50", ""],
        [
            [
                one["method"],
                f"{one['hr@50']:.4f}",
                _change(one["loss"]["hr@50"], interval=True),
                f"{one['ndcg@50']:.4f}",
                _change(one["loss"]["ndcg@50"], interval=True),
                _change(one["loss_to_trained_on"]["ndcg@50"]),
                f"{one['mrr']:.4f}",
                _change(one["loss"]["mrr"]),
                f"{one['within_ndcg@10']:.4f}",
                _change(one["loss"]["within_ndcg@10"]),
            ]
            for one in found
        ],
    )


def _change(loss: dict[str, float], *, interval: bool = False) -> str:
    """As "-0.4 [-1.0, +0.2]": what was lost is below zero. Nothing where nothing differs."""
    if loss["low"] == loss["high"]:
        return ""
    change = f"{-100 * loss['loss']:+.1f}"
    return f"{change} [{-100 * loss['high']:+.1f}, {-100 * loss['low']:+.1f}]" if interval else change


def draw(figures: Sequence[dict[str, Any]], learned: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Figures 5 to 7: inference, accuracy by log and resources by method; the files that were written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    apart = [one for one in figures if one["form"] == "per candidate"]
    together = [one for one in figures if one["form"] != "per candidate"]
    panels: dict[str, list[tuple[str, list[dict[str, Any]], str, bool]]] = {
        "figure5-inference": [
            ("ms, each candidate its own history", apart, "p50_ms", False),
            ("requests/s, each its own history", apart, "per_s", False),
            ("ms, shared history", together, "p50_ms", False),
            ("requests/s, shared history", together, "per_s", False),
        ],
        "figure7-resources": [
            ("stored bytes", [one for one in apart if "bytes" in one], "bytes", False),
            ("MiB in memory", apart, "memory_mib", False),
        ],
    }
    if learned:
        panels["figure6-accuracy"] = [
            (f"{name}, {log['log']}", log["accuracy"], name, False)
            for log in learned
            for name in ("hr@50", "ndcg@50", "mrr")
        ]
    written = []
    for name, parts in panels.items():
        drawn, axes = pyplot.subplots(1, len(parts), figsize=(4 * len(parts), 3.2), layout="constrained")
        for axis, (label, some, field, _) in zip(axes, parts, strict=True):
            axis.bar(range(len(some)), [one[field] for one in some], color="#4c78a8")
            axis.set_xticks(
                range(len(some)), [one["method"] for one in some], rotation=30, ha="right", fontsize=8
            )
            axis.set_title(label, fontsize=9)
        path = folder / f"{name}.svg"
        drawn.savefig(path)
        pyplot.close(drawn)
        written.append(path)
    return written
