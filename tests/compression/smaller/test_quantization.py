"""Formulas 8 and 9, and training through them."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compression.smaller.quantization import Grid, aware, fake_quantize, quantize, step_size


def test_the_step_is_the_range_of_what_is_not_zero_over_the_levels():
    weights = torch.tensor([0.0, 2.0, 3.0, 9.5, 0.0])
    step, low, high = step_size(weights, Grid(bits=4))
    assert (float(step), float(low), float(high)) == (pytest.approx(7.5 / 15), 2.0, 9.5)


def test_a_row_has_a_step_of_its_own_and_an_empty_row_one_that_is_harmless():
    weights = torch.tensor([[-1.0, 0.5, 0.0], [0.0, 30.0, -33.0], [0.0, 0.0, 0.0], [7.0, 0.0, 7.0]])
    step, _, _ = step_size(weights, Grid(bits=2, per_row=True))
    assert step.flatten().tolist() == pytest.approx([0.5, 21.0, 1.0, 7.0])
    values = quantize(weights, Grid(bits=2, per_row=True)).values()
    assert values[2].tolist() == [0.0, 0.0, 0.0] and values[3].tolist() == [7.0, 0.0, 7.0]


@given(st.integers(2, 8), st.integers(0, 2**31 - 1), st.booleans(), st.floats(0.01, 100))
def test_values_are_close_zeros_stay_and_codes_fit_their_bits(bits, seed, per_row, size):
    torch.manual_seed(seed)
    weights = size * (torch.randn(4, 9) + torch.randn(4, 1))
    weights[torch.rand(4, 9) < 0.3] = 0.0
    made = quantize(weights, Grid(bits, per_row))
    assert bool(((made.values() - weights).abs() <= made.step * 1.01).all())
    assert bool((made.values()[weights == 0] == 0).all())
    assert int((made.high - made.low).max()) < 2**bits
    kept = made.codes[weights != 0]
    low = made.low.expand_as(made.codes)[weights != 0]
    high = made.high.expand_as(made.codes)[weights != 0]
    assert bool((kept >= low).all()) and bool((kept <= high).all())


@given(st.integers(2, 8), st.integers(0, 2**31 - 1), st.booleans())
def test_what_is_rounded_once_is_not_changed_by_rounding_it_again(bits, seed, per_row):
    torch.manual_seed(seed)
    weights = torch.randn(6, 40)
    weights[torch.rand(6, 40) < 0.3] = 0.0
    grid = Grid(bits, per_row)
    once = quantize(weights, grid)
    again = quantize(once.values(), grid)
    assert torch.equal(again.codes, once.codes)
    torch.testing.assert_close(again.step, once.step)


def test_both_ends_have_codes_where_they_lie_between_two():
    """Rounded half to even, -2.5 and 0.5 steps would be -2 and 0, a code less than there are."""
    once = quantize(torch.tensor([[-2.5, -1.0, 0.0, 0.5]]), Grid(2, per_row=True))
    assert once.codes.tolist() == [[-2, -1, 0, 1]]
    assert torch.equal(quantize(once.values(), Grid(2, per_row=True)).values(), once.values())


def test_more_bits_are_closer():
    weights = torch.randn(64, 64)
    errors = [float((quantize(weights, Grid(bits)).values() - weights).abs().mean()) for bits in (2, 4, 6, 8)]
    assert all(coarse > 3 * fine for coarse, fine in itertools.pairwise(errors))


def test_bits_out_of_range_are_refused():
    with pytest.raises(ValueError, match="bits"):
        Grid(bits=9)


def test_gradients_pass_as_if_nothing_had_been_rounded():
    weights = torch.randn(3, 4, requires_grad=True)
    rounded = fake_quantize(weights, Grid(bits=2))
    assert not torch.equal(rounded, weights)
    (rounded * torch.arange(12.0).view(3, 4)).sum().backward()
    assert torch.equal(weights.grad, torch.arange(12.0).view(3, 4))


def world():
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))


def test_training_with_rounding_ends_with_weights_on_the_grid_and_better_than_rounding_afterwards():
    rows, wanted = torch.arange(20), torch.linspace(-1, 1, 20)[:, None]

    def fit(network, steps):
        optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            (network(rows) - wanted).pow(2).mean().backward()
            optimizer.step()

    def loss(network):
        return float((network(rows) - wanted).detach().pow(2).mean())

    chosen = {"0": Grid(2, per_row=True), "1": Grid(2), "3": Grid(2)}
    plain, trained = world(), world()
    for network in (plain, trained):
        fit(network, 150)
    with aware(plain, chosen):
        pass
    with aware(trained, chosen):
        fit(trained, 150)
    for name, grid in chosen.items():
        weight = dict(trained.named_modules())[name].weight
        assert torch.allclose(quantize(weight, Grid(8, grid.per_row)).values(), weight, atol=0.02)
        rows_of = weight if grid.per_row else weight.flatten()[None]
        assert max(len(row.unique()) for row in rows_of) <= 2**grid.bits
    assert loss(trained) < 0.5 * loss(plain)
    assert set(dict(trained.named_parameters())) == set(dict(world().named_parameters()))


def test_a_table_with_one_step_for_all_is_refused():
    with pytest.raises(ValueError, match="per row"), aware(world(), {"0": Grid(4)}):
        pass
