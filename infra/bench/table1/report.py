"""What was measured, as tables beside the paper's and as its figures 5 to 7."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

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
OVER: Final = ("hr@50", "ndcg@50", "mrr")
WITHIN: Final = ("within_hr@10", "within_ndcg@10", "within_mrr")


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


def losses(made: Sequence[Made]) -> list[dict[str, Any]]:
    """Accuracy of every method that was trained, and by which share it is lower than that of the Baseline
    when it is trained on as long as they were."""
    trained = [one for one in made if "accuracy" in one.figures]
    if not trained or trained[0].method != "Baseline":
        return []
    base = trained[0].figures["trained_on"]
    judged = [(one.method, one.zeros, one.bytes, one.figures["accuracy"]) for one in trained]
    judged.insert(1, ("Baseline, trained on", trained[0].zeros, trained[0].bytes, base))
    return [
        {
            "method": method,
            "gone_or_zero": round(zeros, 4),
            "bytes": size,
            **accuracy,
            "loss": {
                name: round(1 - accuracy[name] / base[name], 4) for name in (*OVER, *WITHIN) if base[name]
            },
        }
        for method, zeros, size, accuracy in judged
    ]


def show_losses(found: Sequence[dict[str, Any]], *, title: str) -> None:
    report.table(
        title,
        [
            "method",
            *(
                f"{name.removeprefix('within_')}{' of 50' * name.startswith('within')}"
                for name in (*OVER, *WITHIN)
            ),
        ],
        [
            [
                one["method"],
                *(f"{one[name]:.4f} ({-one['loss'].get(name, 0.0):+.1%})" for name in (*OVER, *WITHIN)),
            ]
            for one in found
        ],
    )


def draw(figures: Sequence[dict[str, Any]], accuracy: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Figures 5 to 7: inference, accuracy and resources by method; the files that were written."""
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
    if accuracy:
        panels["figure6-accuracy"] = [
            (name, list(accuracy), name, False) for name in ("hr@50", "ndcg@50", "mrr")
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
