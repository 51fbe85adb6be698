"""A run as one page for a person: what it learnt, beside what, whether it may serve, what took how long.

The page needs nothing beside it: figures are SVG inside, styles too, no script.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from compression.evaluation.tables import FULL, tables
from compression.files import write_whole
from compression.retraining.runs import REPORT, Run, RunState

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#c2571a", "#8a8f98"
_STYLE: Final = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2127;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .8rem .25rem 0;text-align:left;border-bottom:1px solid #e3e6ea;vertical-align:top}
td.n,th.n{text-align:right}tr.ours{font-weight:600}
.passed,.published{color:#1a7f37}.refused,.failed{color:#b3261e}.skipped,.running{color:#6b7280}
svg{max-width:100%;height:auto}.row{display:flex;flex-wrap:wrap;gap:1rem}
"""


def write(run: Run) -> Path:
    """Write the page into the run's folder; whatever step the run has come to."""
    path = run.folder / REPORT
    state = Run.find(run.folder.parent, run.folder.name).state
    write_whole(path, page(state).encode())
    return path


def page(state: RunState) -> str:
    """The page as HTML."""
    said = {name: step.result for name, step in state.steps.items()}
    parts = [
        f"<h1>Retraining {escape(state.run)}</h1>",
        f'<p>Version {escape(state.version)}: <b class="{state.outcome}">{state.outcome}</b>'
        f"{'. ' + escape(state.detail) if state.detail else ''}</p>",
    ]
    if "publish" in said:
        key = said["publish"]["signed_by"]
        parts.append(f"<p>{f'Signed by key {escape(key[:16])}.' if key else 'Not signed.'}</p>")
    if "read" in said:
        parts += ["<h2>Data</h2>", _pairs(_data(said["read"]))]
    if "train" in said:
        parts += ["<h2>Training</h2>", _training(said["train"])]
    if "compression" in said.get("export", {}):
        parts += ["<h2>Compression</h2>", _compression(said)]
    if said.get("evaluate", {}).get("targets"):
        parts += ["<h2>Accuracy on the test events</h2>", _accuracy(said["evaluate"])]
    if "gate" in said:
        parts += ["<h2>Gate</h2>", _gate(said["gate"])]
    parts += ["<h2>Time</h2>", _timings(state)]
    head = f'<meta charset="utf-8"><title>Retraining {escape(state.run)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _data(read: dict[str, Any]) -> dict[str, str]:
    data = read["data"]
    told = {
        "log": str(data["log"]),
        "events": f"{data['events']:,} of {data['users']:,} users",
        "bad records": f"{data['bad_rows']:,}"
        + "".join(f", {count:,} {reason}" for reason, count in data["bad_reasons"].items()),
        "older ones left out": f"{data['left_out']:,}",
        "served before": str(read["parent"] or "nothing"),
        "started from": str(read["started_from"] or "random weights"),
    }
    if "end_offsets" in data:
        start, end = data["start_offsets"], data["end_offsets"]
        told["offsets"] = ", ".join(f"{number}: {start[number]}–{end[number]}" for number in sorted(end))
    return told


def _training(trained: dict[str, Any]) -> str:
    epochs = trained["epochs"]
    numbers = [epoch["number"] for epoch in epochs]
    # A retrieval network has the one head.
    heads = [head for head in ("retrieval", "ranking") if epochs and f"{head}_loss" in epochs[0]]
    losses = {f"{head} loss": [epoch[f"{head}_loss"] for epoch in epochs] for head in heads}
    gains = {f"{head} NDCG@10": [epoch[f"{head}_ndcg"] for epoch in epochs] for head in heads}
    curves = _lines(numbers, losses, "loss, mean of the epoch", None) + _lines(
        numbers, gains, "validation", trained["best"]
    )
    words = f"{len(epochs)} epochs, the best was number {trained['best']}; ended by {trained['stopped']}."
    return f'<div class="row">{curves}</div><p>{escape(words)}</p>'


def _compression(said: dict[str, Any]) -> str:
    """Before and after, and between them what each stage has made."""
    told = said["export"]["compression"]
    checks = {check["name"]: check for check in said.get("gate", {}).get("checks", [])}

    def row(name: str, made: dict[str, Any], size: str, took: str, ndcg: Sequence[str]) -> list[str]:
        shape = made["shape"]
        sizes = f"{shape['layers']} × ({shape['dim']}, {shape['ffn']})"
        return [name, sizes, f"{made['parameters']:,}", f"{made['mflop']:.2f}", size, took, *ndcg]

    def end(name: str, made: dict[str, Any], took: str, ndcg: str) -> list[str]:
        """A network whose files are there."""
        gain = checks.get("gain", {}).get("figures")
        kept = [checks[head]["figures"] for head in ("retrieval kept", "ranking kept") if head in checks]
        figures = [f"{figure[ndcg]:.4f}" for figure in kept] or ["", ""]
        return row(name, made, f"{made['bytes'] / 1e6:.1f}", f"{gain[took]:.2f}" if gain else "", figures)

    rows = [
        end("released", told["after"], "ms", "candidate"),
        end("trained", told["before"], "teacher_ms", "teacher"),
        *(row(name, said[name], "", "", ["", ""]) for name in told["stages"]),
    ]
    heads = ["network", "layers × (width, channels)", "parameters", "MFLOP a list", "MB", "ms, 32 lists"]
    heads += ["retrieval NDCG@10", "ranking NDCG@10"]
    return _table(heads, rows, ours=0)


def _accuracy(metrics: dict[str, Any]) -> str:
    shown = [
        f"<h3>{escape(table.title)}</h3>{_table(table.heads, table.rows, table.ours)}"
        for table in tables(metrics)
    ]
    lists = metrics.get("lists", {})
    if lists.get("targets"):
        weights = ", ".join(f"{name} {weight:g}" for name, weight in lists["weights"].items())
        shown.append(f"<p>Weights of the counts, chosen on validation: {escape(weights)}.</p>")
    hits = {name.replace("_", "-"): metrics[name]["hr@10"] for name in FULL if name in metrics}
    bars = _bars(hits, "HR@10")
    return f"<p>{metrics['targets']:,} events, {escape(metrics['split'])}.</p>{bars}{''.join(shown)}"


def _gate(verdict: dict[str, Any]) -> str:
    head = f"<p>Against {escape(verdict['against'] or 'nothing: no version served')}.</p>"
    rows = "".join(
        f"<tr><td>{escape(check['name'])}</td>"
        f'<td class="{check["outcome"]}">{check["outcome"]}</td><td>{escape(check["detail"])}</td></tr>'
        for check in verdict["checks"]
    )
    return f"{head}<table><tr><th>check</th><th></th><th></th></tr>{rows}</table>"


def _timings(state: RunState) -> str:
    took = {name: step.seconds for name, step in state.steps.items()}
    if not took:
        return "<p>No step is done yet.</p>"
    words = f"{sum(took.values()):.1f} s in {len(took)} steps, {state.attempts} attempts."
    return f"<p>{words}</p>{_bars(took, 'seconds')}"


def _pairs(told: dict[str, str]) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in told.items()
    )
    return f"<table>{rows}</table>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], ours: int | None) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if place else ''}>{escape(value)}</{tag}>"
            for place, value in enumerate(values)
        )

    body = "".join(
        f"<tr{' class=ours' if number == ours else ''}>{cells('td', row)}</tr>"
        for number, row in enumerate(rows)
    )
    return f"<table><tr>{cells('th', heads)}</tr>{body}</table>"


def _lines(x: Sequence[int], series: dict[str, list[float]], title: str, best: int | None) -> str:
    figure, axes = _figure(4.6, 2.8)
    for (name, values), colour in zip(series.items(), (_BLUE, _ORANGE), strict=False):
        axes.plot(x, values, marker="o", markersize=3, color=colour, label=name)
    if best is not None:
        axes.axvline(best, color=_GREY, linewidth=1, linestyle=":")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def _bars(values: dict[str, float], title: str) -> str:
    figure, axes = _figure(6.4, 0.5 + 0.3 * len(values))
    names = list(values)[::-1]
    bars = axes.barh(names, [values[name] for name in names], color=_GREY, height=0.6)
    bars[-1].set_color(_BLUE)
    axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axes.set_title(title, fontsize=10, loc="left")
    return _svg(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
