"""`tailrace bench cost-model`: what every warmed shape takes, and how well formulas say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from infra.bench import options as bench_options
from infra.commands import options

if TYPE_CHECKING:
    from compression.releases.registry import ModelShape
    from inference.cost_model import CostModel, PaperCost, Residuals
    from inference.engines.base import Shape

LISTS: Final = "list"  # a history encoded and its candidates scored: what a dispatcher asks about


@dataclass(frozen=True, slots=True)
class Fitted:
    """One graph, or both for a list: each shape's seconds, as measured and as either formula has them."""

    name: str
    shapes: list[Shape]
    measured_s: list[float]
    ours_s: list[float]
    ours_left_out_s: list[float]
    paper_s: list[float]

    def residuals(self) -> dict[str, Residuals]:
        """By formula; "ours, left out" predicts each shape from the others."""
        from inference.cost_model import Residuals

        return {
            name: Residuals.of(self.measured_s, predicted)
            for name, predicted in (
                ("ours", self.ours_s),
                ("ours, left out", self.ours_left_out_s),
                ("paper", self.paper_s),
            )
        }


@dataclass(frozen=True, slots=True)
class Report:
    """Everything one run found. `papers` are the fits of τ = α·m·L·h² + β, by name of what was fitted."""

    version: str
    engine: str
    shape: ModelShape
    cost: CostModel
    papers: dict[str, PaperCost]
    fitted: list[Fitted]


@click.command(name="cost-model")
@click.option("--engine", default="onnx", show_default=True)
@click.option("--rounds", type=click.IntRange(1, 50), default=5, show_default=True)
@click.option(
    "--repeats", type=click.IntRange(1, 50), default=3, show_default=True, help="Per shape and round."
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Predicted against measured, a PNG."
)
@options.registry
@bench_options.json_path
def cost_model(
    *, engine: str, rounds: int, repeats: int, plot: Path | None, registry: Path, json_path: Path | None
) -> None:
    """What every warmed shape takes, and the cost formulas fitted to it: the paper's and ours.

    \b
    tailrace bench cost-model
    tailrace bench cost-model --engine openvino --plot cost.png
    """
    report = fit(registry, engine, rounds=rounds, repeats=repeats)
    show(report, json_path)
    if plot is not None:
        draw(report, plot)


def fit(registry: Path, engine: str, *, rounds: int, repeats: int) -> Report:
    """Measure on the released model, fit, predict."""
    from compression.releases.registry import Registry
    from inference import engines
    from inference.buckets import Buckets
    from inference.cost_model import CostModel, left_out

    artefact = Registry(registry).open()
    shape = artefact.manifest.model
    made = engines.create(engine)
    made.load(artefact, ("encode", "score"))
    buckets = Buckets().up_to(shape.max_history)
    try:
        measured_s = measure(made, list(buckets.shapes()), rounds=rounds, repeats=repeats)
    finally:
        made.close()
    cost = CostModel.fit(shape, measured_s)
    apart_s = left_out(cost, measured_s)
    predicted_s = {one: cost.seconds(one) for one in measured_s}
    papers: dict[str, PaperCost] = {}
    fitted = []
    for graph in ("encode", "score", LISTS):
        shapes = [one for one in measured_s if one.graph == (graph if graph != LISTS else "score")]
        paper, paper_s = _paper(shape, graph, shapes, _of(graph, shapes, measured_s))
        papers[graph] = paper
        took_s, ours_s, left_out_s = (
            _of(graph, shapes, seconds) for seconds in (measured_s, predicted_s, apart_s)
        )
        fitted.append(Fitted(graph, shapes, took_s, ours_s, left_out_s, paper_s))
    return Report(artefact.version, made.name, shape, cost, papers, fitted)


def measure(engine: Any, shapes: Sequence[Shape], *, rounds: int, repeats: int) -> dict[Shape, float]:
    """The fastest repeat of all rounds, as `warm_up` counts; rounds go over all shapes, so that no busy
    second of the machine is one shape's alone."""
    taken = [engine.warm_up(shapes, repeats=repeats) for _ in range(rounds)]
    return {shape: min(one[shape] for one in taken) for shape in shapes}


def _of(name: str, shapes: Sequence[Shape], seconds: Mapping[Shape, float]) -> list[float]:
    """The seconds of these shapes; of a list, with those of its encode."""
    if name != LISTS:
        return [seconds[shape] for shape in shapes]
    return [seconds[shape] + seconds[shape._replace(graph="encode", candidates=0)] for shape in shapes]


def _paper(
    model: ModelShape, name: str, shapes: Sequence[Shape], measured_s: list[float]
) -> tuple[PaperCost, list[float]]:
    """The paper's form with m what goes through the layers: events where histories are encoded,
    candidates else."""
    from inference.cost_model import PaperCost

    many = [one.batch * (one.history if name == "encode" else one.candidates) for one in shapes]
    paper = PaperCost.fit(model.dim, model.layers, zip(many, measured_s, strict=True))
    return paper, [paper.predict(m) for m in many]


def show(found: Report, json_path: Path | None) -> None:
    """The prices, the residuals, and the JSON where a path is given."""
    from inference.cost_model import TERMS, activation_bytes, flops, parameter_bytes, parameters
    from infra.bench import report

    model = found.shape
    sizes = (model.dim, model.dim, model.layers)
    rows = [
        [fit.name, formula, str(residuals.shapes), f"{residuals.r2:.4f}"]
        + [f"{100 * error:.1f} %" for error in (residuals.median_error, residuals.worst_error)]
        for fit in found.fitted
        for formula, residuals in fit.residuals().items()
    ]
    report.table(
        f"cost model: {found.engine}, model {found.version}, d = {model.dim} × {model.layers} layers",
        ["graph", "formula", "shapes", "R²", "median error", "worst error"],
        rows,
    )
    report.table(
        "ours: price per unit",
        ["graph", *(f"{term} ns" for term in TERMS)],
        [
            [graph, *(f"{price * 1e9:,.4g}" for price in prices)]
            for graph, prices in found.cost.prices.items()
        ],
    )
    report.table(
        "paper: τ = α·m·L·h² + β",
        ["graph", "α ps", "β µs"],
        [
            [name, f"{paper.alpha * 1e12:.3f}", f"{paper.beta * 1e6:.1f}"]
            for name, paper in found.papers.items()
        ],
    )
    paper_sizes = {
        "parameters": parameters(*sizes),
        "flops_of_50_candidates": flops(50, *sizes),
        "parameter_bytes_f32": parameter_bytes(*sizes),
        "activation_bytes_of_50_f32": activation_bytes(50, model.dim),
    }
    report.note(
        f"One layer's activations cost more beyond {found.cost.cache_bytes / 2**20:.1f} MiB. By the paper's "
        f"(1) and (2): {paper_sizes['parameters']:,} parameters, "
        f"{paper_sizes['flops_of_50_candidates']:,} operations for 50 candidates."
    )
    report.write(
        json_path,
        "cost-model",
        {
            "engine": found.engine,
            "model": found.version,
            "shape": model.model_dump(),
            "paper_sizes": paper_sizes,
            "ours": {
                graph: dict(zip(TERMS, prices, strict=True)) for graph, prices in found.cost.prices.items()
            },
            "cache_bytes": found.cost.cache_bytes,
            "paper": {
                name: {"alpha_s": paper.alpha, "beta_s": paper.beta} for name, paper in found.papers.items()
            },
            "residuals": {
                fit.name: {formula: asdict(residuals) for formula, residuals in fit.residuals().items()}
                for fit in found.fitted
            },
            "measured_s": [
                {**shape._asdict(), "seconds": seconds}
                for fit in found.fitted
                if fit.name != LISTS
                for shape, seconds in zip(fit.shapes, fit.measured_s, strict=True)
            ],
        },
    )


def draw(found: Report, path: Path) -> None:
    """Predicted against measured, both in ms on logarithmic axes, one panel per graph."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(found.fitted), figsize=(4.4 * len(found.fitted), 4.2))
    for panel, fit in zip(panels, found.fitted, strict=True):
        measured = [1e3 * seconds for seconds in fit.measured_s]
        for label, predicted, mark in (
            ("paper", fit.paper_s, "x"),
            ("ours, left out", fit.ours_left_out_s, "o"),
        ):
            panel.plot(measured, [1e3 * s for s in predicted], mark, label=label, markersize=4, alpha=0.7)
        ends = [min(measured), max(measured)]
        panel.plot(ends, ends, color="grey", linewidth=0.8)
        panel.set(xscale="log", yscale="log", title=fit.name, xlabel="measured, ms", ylabel="predicted, ms")
        panel.legend()
    figure.suptitle(f"{found.engine}, d = {found.shape.dim} × {found.shape.layers} layers")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
