"""What a call will cost, before it has been made: the paper's formulas, and ours fitted to measurements.

Formula numbers are those of "Deep Learning Model Acceleration and Optimization Strategies for Real-Time
Recommendation Systems", II.B. Its candidates each carry the whole network; ours share one encoded
history, so work grows with events in one graph and with candidates in the other, and `CostModel` counts
them apart:

>>> model = CostModel.fit(shape, {Shape("encode", 1, 25, 0): 0.8e-3, Shape("encode", 8, 25, 0): 4.1e-3, ...})
>>> model.predict(batch=16, history=50, candidates=200)
0.0213
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np
import numpy.typing as npt

from compression.releases.registry import ModelShape
from inference.engines.base import Shape
from inference.types import Graph

Float64 = npt.NDArray[np.float64]


def parameters(embedding_dim: int, hidden: int, layers: int) -> int:
    """(1): P ≈ dₑ·h + (L−1)·h² + h, of the dense part; embedding tables are not counted."""
    return embedding_dim * hidden + (layers - 1) * hidden**2 + hidden


def flops(candidates: int, embedding_dim: int, hidden: int, layers: int) -> int:
    """(2): m·(dₑ·h + (L−1)·h² + h), one multiply-accumulate counted once."""
    return candidates * parameters(embedding_dim, hidden, layers)


def parameter_bytes(embedding_dim: int, hidden: int, layers: int, bytes_per_value: int = 4) -> int:
    """M_params = P·b_p."""
    return parameters(embedding_dim, hidden, layers) * bytes_per_value


def activation_bytes(candidates: int, hidden: int, bytes_per_value: int = 4) -> int:
    """M_act = m·h·b_a: one layer's activations of every candidate."""
    return candidates * hidden * bytes_per_value


@dataclass(frozen=True, slots=True)
class PaperCost:
    """τ ≈ α·m·L·h² + β: seconds for m candidates; α is the hardware's, β what every call costs."""

    alpha: float
    beta: float
    hidden: int
    layers: int

    @classmethod
    def fit(cls, hidden: int, layers: int, measured: Iterable[tuple[int, float]]) -> PaperCost:
        """α and β, neither below 0, at the least relative error over pairs of (m, seconds)."""
        candidates, seconds = (np.array(column, np.float64) for column in zip(*measured, strict=True))
        work = candidates * layers * hidden**2
        beta, alpha = least_relative(np.stack([np.ones_like(work), work], 1), seconds)
        return cls(float(alpha), float(beta), hidden, layers)

    def predict(self, candidates: int) -> float:
        return self.alpha * candidates * self.layers * self.hidden**2 + self.beta


# What a call does, by graph, in the order of `amounts`. "rows" are the users of a batch, "dense" and
# "attention" multiply-accumulates, "moved" the values that are copied and not computed with, "spilled"
# the bytes of one layer's activations that a core's cache does not hold.
TERMS: Final = ("call", "rows", "dense", "attention", "moved", "spilled")
# Sizes tried for that cache. Where the cost of a call bends is measured, not asked of the machine.
_CACHES: Final = tuple(int(2 ** (exponent / 2)) for exponent in range(38, 50))


def amounts(model: ModelShape, shape: Shape, cache_bytes: int) -> tuple[float, ...]:
    """How much of each of `TERMS` one call has; the network is `compression.training.model`.

    encode: every event becomes keys and values in each of L layers, and goes through attention and the
    feed-forward part in all but the last, where only the newest event asks: B·H·(2·L·d² + 2·(L−1)·d·f);
    without keys and values of the last where no candidates ask for them (`compression.retrieval.export`).
    score: every candidate goes through L layers of attention and feed-forward, without keys and values
    of its own: B·C·2·L·d·f; by a vector it is a row times that, B·C·d. rank: both. append: one
    event of its own through L layers: B·2·L·(d² + d·f).
    """
    batch, history, candidates = shape.batch, shape.history, shape.candidates
    dim, ffn, layers, states = model.dim, model.ffn, model.layers, len(model.state_names)
    projected = layers - model.scores_by_vector
    dense = attention = moved = tokens = 0
    if shape.graph in ("encode", "rank"):
        dense += batch * (history * 2 * (projected * dim**2 + (layers - 1) * dim * ffn) + 2 * dim * ffn)
        attention += batch * 2 * dim * history * ((layers - 1) * history + 1)
        moved += batch * history * dim * (4 + states)
        tokens = batch * history
    if shape.graph in ("score", "rank"):
        if not model.scores_by_vector:
            dense += batch * candidates * 2 * layers * dim * ffn
            attention += batch * candidates * 2 * layers * dim * (history + 1)
            moved += batch * dim * (states * history + 2 * candidates)
        else:
            dense += batch * candidates * dim
            moved += batch * candidates * dim
        tokens = max(tokens, batch * candidates)
    if shape.graph == "append":
        dense += batch * 2 * layers * dim * (dim + ffn)
        attention += batch * 2 * layers * dim * (history + 1)
        moved += batch * states * history * dim
        tokens = batch
    layer_bytes = 4 * tokens * (2 * dim + ffn + history)
    spilled = max(0, layer_bytes - cache_bytes)
    return 1.0, float(batch), float(dense), float(attention), float(moved), float(spilled)


@dataclass(frozen=True, slots=True)
class Residuals:
    """How far predictions lie from measurements. Errors are relative: 0.1 is ten per cent off."""

    shapes: int
    r2: float
    median_error: float
    worst_error: float

    @classmethod
    def of(cls, measured_s: Sequence[float], predicted_s: Sequence[float]) -> Residuals:
        """R² is of seconds as they are, so the largest shapes decide it; the errors weigh all alike."""
        measured, predicted = np.array(measured_s), np.array(predicted_s)
        spread = float(((measured - measured.mean()) ** 2).sum())
        errors = np.abs(predicted - measured) / measured
        left = float(((measured - predicted) ** 2).sum())
        return cls(
            len(measured), 1 - left / spread if spread else 0.0, float(np.median(errors)), float(errors.max())
        )


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of any shape, from those measured. Prices are per graph, one for each of `TERMS`, in seconds.

    A prior: what has been measured is known better. `predict` is arithmetic on a dozen floats and may be
    called for every batch.
    """

    model: ModelShape
    prices: Mapping[Graph, tuple[float, ...]]
    cache_bytes: int

    @classmethod
    def fit(cls, model: ModelShape, measured_s: Mapping[Shape, float]) -> CostModel:
        """Prices, none below 0, at the least relative error: a call of 0.3 ms counts as much as one of 30.

        `measured_s` may come as `Engine.warm_up` returns it. Graphs that are not in it get no price.
        """
        fits = [cls._at(model, measured_s, cache_bytes) for cache_bytes in _CACHES]
        return min(fits, key=lambda fit: fit._squared_error(measured_s))

    def predict(self, batch: int, history: int, candidates: int) -> float:
        """Seconds to encode `batch` histories and to score so many candidates of each.

        `KeyError` where neither the two graphs nor "rank" were fitted.
        """
        if "rank" in self.prices and "encode" not in self.prices:
            return self.seconds(Shape("rank", batch, history, candidates))
        encode = self.seconds(Shape("encode", batch, history, 0))
        return encode + self.seconds(Shape("score", batch, history, candidates)) if candidates else encode

    def seconds(self, shape: Shape) -> float:
        """Seconds of one call of one graph; `KeyError` where that graph was not fitted."""
        prices = self.prices[shape.graph]
        done = amounts(self.model, shape, self.cache_bytes)
        return sum(price * amount for price, amount in zip(prices, done, strict=True))

    def residuals(self, graph: Graph, measured_s: Mapping[Shape, float]) -> Residuals:
        """Against the measurements of one graph, those it was fitted to or others."""
        shapes = [shape for shape in measured_s if shape.graph == graph]
        return Residuals.of(
            [measured_s[shape] for shape in shapes], [self.seconds(shape) for shape in shapes]
        )

    def without(self, shape: Shape, measured_s: Mapping[Shape, float]) -> CostModel:
        """Fitted again to all measurements but one."""
        others = {other: took for other, took in measured_s.items() if other != shape}
        return self._at(self.model, others, self.cache_bytes)

    @classmethod
    def _at(cls, model: ModelShape, measured_s: Mapping[Shape, float], cache_bytes: int) -> CostModel:
        prices: dict[Graph, tuple[float, ...]] = {}
        for graph in dict.fromkeys(shape.graph for shape in measured_s):
            shapes = [shape for shape in measured_s if shape.graph == graph]
            rows = np.array([amounts(model, shape, cache_bytes) for shape in shapes])
            seconds = np.array([measured_s[shape] for shape in shapes])
            prices[graph] = tuple(least_relative(rows, seconds).tolist())
        return cls(model, prices, cache_bytes)

    def _squared_error(self, measured_s: Mapping[Shape, float]) -> float:
        return sum((self.seconds(shape) / took - 1) ** 2 for shape, took in measured_s.items())


def left_out(cost: CostModel, measured_s: Mapping[Shape, float]) -> dict[Shape, float]:
    """What each shape is predicted to cost by a fit to all others: how good a prior is for a new shape.
    The size of the cache stays that of the whole fit."""
    return {shape: cost.without(shape, measured_s).seconds(shape) for shape in measured_s}


def least_relative(amounts_of: Float64, seconds: Float64) -> Float64:
    """Non-negative prices [terms] that minimise the squared relative error of amounts [n, terms] · prices.

    With so few terms every set of those above 0 can be tried: the best solution is among them. Seconds
    must be positive.
    """
    if not (seconds > 0).all() or not np.isfinite(seconds).all():
        raise ValueError("measured times must be positive and finite")
    scale = np.maximum(amounts_of.max(axis=0), 1e-300)
    rows = amounts_of / scale / seconds[:, None]
    terms = amounts_of.shape[1]
    best: Float64 = np.zeros(terms)
    best_error = float(len(seconds))
    for count in range(1, terms + 1):
        for used in map(list, combinations(range(terms), count)):
            found = np.linalg.lstsq(rows[:, used], np.ones(len(seconds)), rcond=None)[0]
            error = float(((rows[:, used] @ found - 1) ** 2).sum())
            if (found >= 0).all() and error < best_error:
                best, best_error = np.zeros(terms), error
                best[used] = found
    prices: Float64 = best / scale
    return prices
