"""The paper's arithmetic, and fits that find again what made the times they are given."""

from __future__ import annotations

import numpy as np
import pytest

from compression.releases.registry import ModelShape
from inference.buckets import Buckets
from inference.cost_model import (
    CostModel,
    PaperCost,
    Residuals,
    activation_bytes,
    amounts,
    flops,
    least_relative,
    left_out,
    parameter_bytes,
    parameters,
)
from inference.engines.base import Shape

MODEL = ModelShape(dim=64, layers=2, heads=1, ffn=128, max_history=100, item_rows=500, category_rows=20)
CACHE_BYTES = 2**21
# Seconds per unit of each term, of the size that a slow core has.
PRICES = {
    "encode": (70e-6, 1e-6, 15e-12, 60e-12, 1e-9, 0.2e-9),
    "score": (60e-6, 2e-6, 25e-12, 25e-12, 1e-9, 1.6e-9),
}


def times(*, noise: float = 0.0, shapes: list[Shape] | None = None) -> dict[Shape, float]:
    """What an engine with these prices would measure."""
    rng = np.random.default_rng(3)
    return {
        shape: float(np.dot(PRICES[shape.graph], amounts(MODEL, shape, CACHE_BYTES)))
        * (1 + noise * rng.standard_normal())
        for shape in shapes or Buckets().shapes()
    }


def test_the_papers_sizes_are_its_formulas() -> None:
    # dₑ = 32, h = 64, L = 3: 32·64 + 2·64² + 64.
    assert parameters(32, 64, 3) == 2_048 + 8_192 + 64
    assert flops(50, 32, 64, 3) == 50 * 10_304
    assert parameter_bytes(32, 64, 3, bytes_per_value=1) == 10_304
    assert parameter_bytes(32, 64, 3) == 4 * 10_304
    assert activation_bytes(50, 64, bytes_per_value=2) == 6_400


def test_the_papers_alpha_and_beta_are_found_again() -> None:
    made = PaperCost(alpha=2e-11, beta=150e-6, hidden=64, layers=2)
    found = PaperCost.fit(64, 2, [(m, made.predict(m)) for m in (1, 10, 50, 200, 1_600)])
    assert found.alpha == pytest.approx(made.alpha)
    assert found.beta == pytest.approx(made.beta)


def test_alpha_and_beta_stay_non_negative_where_a_line_would_not() -> None:
    # A straight line through these crosses zero far to the right of no candidates.
    found = PaperCost.fit(64, 2, [(100, 1e-6), (200, 1e-3), (300, 2e-3)])
    assert found.alpha > 0
    assert found.beta == 0
    assert found.predict(1) > 0


def test_what_every_shape_takes_is_predicted_from_all_of_them() -> None:
    cost = CostModel.fit(MODEL, times())
    assert cost.cache_bytes == CACHE_BYTES
    for shape, took in times().items():
        assert cost.seconds(shape) == pytest.approx(took, rel=1e-6)


def test_a_list_costs_its_encode_and_its_score() -> None:
    measured = times()
    cost = CostModel.fit(MODEL, measured)
    both = measured[Shape("encode", 8, 50, 0)] + measured[Shape("score", 8, 50, 200)]
    assert cost.predict(8, 50, 200) == pytest.approx(both, rel=1e-6)
    assert cost.predict(8, 50, 0) == pytest.approx(measured[Shape("encode", 8, 50, 0)], rel=1e-6)


def test_shapes_never_measured_are_foreseen_through_noise() -> None:
    unseen = [Shape("encode", 24, 80, 0), Shape("score", 12, 60, 120), Shape("score", 32, 100, 300)]
    cost = CostModel.fit(MODEL, times(noise=0.03))
    for shape, took in times(shapes=unseen).items():
        assert cost.seconds(shape) == pytest.approx(took, rel=0.1)


def test_each_shape_is_foreseen_by_the_others() -> None:
    measured = times(noise=0.02, shapes=list(Buckets(batches=(1, 4, 32)).shapes()))
    cost = CostModel.fit(MODEL, measured)
    apart = left_out(cost, measured)
    assert Residuals.of(list(measured.values()), [apart[shape] for shape in measured]).median_error < 0.04
    # It is the others that say so: a shape that was measured wrong is not believed.
    odd = Shape("encode", 4, 50, 0)
    assert left_out(cost, {**measured, odd: 10 * measured[odd]})[odd] < 3 * measured[odd]


def test_one_event_appended_is_far_less_work_than_its_history_encoded() -> None:
    # Operations on weights and on states; nothing spills.
    whole, one = (amounts(MODEL, Shape(graph, 8, 100, 0), CACHE_BYTES) for graph in ("encode", "append"))
    assert one[2] * 20 < whole[2]
    assert one[3] * 20 < whole[3]
    assert one[5] == 0
    measured = times() | {shape: 1e-6 * sum(one[:2]) for shape in [Shape("append", 8, 100, 0)]}
    assert CostModel.fit(MODEL, measured).predict(8, 100, 50) == pytest.approx(
        CostModel.fit(MODEL, times()).predict(8, 100, 50), rel=0.01
    )


def test_more_work_is_never_foreseen_to_cost_less() -> None:
    # Times that fall with size, as a disturbed warm-up may have them.
    measured = {shape: 1e-3 / (shape.batch * shape.history) for shape in Buckets().shapes()}
    cost = CostModel.fit(MODEL, measured)
    assert 0 < cost.predict(1, 4, 50) <= cost.predict(8, 25, 50) <= cost.predict(32, 100, 200)


def test_one_graph_of_both_halves_is_priced_too() -> None:
    measured = {
        Shape("rank", batch, history, 50): 1e-4 + 2e-5 * batch * history
        for batch in (1, 4, 16)
        for history in (10, 50, 100)
    }
    cost = CostModel.fit(MODEL, measured)
    assert cost.predict(8, 25, 50) == pytest.approx(1e-4 + 2e-5 * 8 * 25, rel=0.3)


def test_a_graph_that_was_not_measured_has_no_price() -> None:
    cost = CostModel.fit(MODEL, times(shapes=[Shape("encode", 1, 25, 0), Shape("encode", 8, 25, 0)]))
    with pytest.raises(KeyError, match="score"):
        cost.predict(1, 25, 50)


@pytest.mark.parametrize("seconds", [0.0, -1e-3, float("nan"), float("inf")])
def test_times_that_cannot_be_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        CostModel.fit(MODEL, {Shape("encode", 1, 25, 0): 1e-3, Shape("encode", 2, 25, 0): seconds})


def test_small_times_weigh_as_much_as_large_ones() -> None:
    # 1 ms and 100 ms, each met only by a price of its own: the middle in relative terms is near neither.
    price = least_relative(np.array([[1.0], [1.0]]), np.array([1e-3, 100e-3]))[0]
    assert price == pytest.approx((1e3 + 10) / (1e6 + 100))


def test_residuals_are_relative() -> None:
    residuals = Residuals.of([1.0, 2.0, 4.0], [1.1, 2.0, 2.0])
    assert residuals.median_error == pytest.approx(0.1)
    assert residuals.worst_error == pytest.approx(0.5)
    assert Residuals.of([1.0, 2.0], [1.0, 2.0]).r2 == 1
