"""Formulas 5 to 7, and that what is pruned stays so."""

import pytest
import torch
from torch import nn

from compression.smaller import pruning


def test_the_threshold_has_the_asked_share_below_it():
    weights = torch.tensor([[-4.0, 0.5, 3.0, -0.1], [1.0, -2.0, 0.2, 5.0]])
    theta = pruning.threshold(weights, 0.375)
    assert theta == 1.0
    assert pruning.mask(weights, theta).tolist() == [[True, False, True, False], [True, True, False, True]]


def test_nothing_is_pruned_at_share_zero_and_an_impossible_share_is_refused():
    weights = torch.randn(5, 5)
    assert bool(pruning.mask(weights, pruning.threshold(weights, 0.0)).all())
    with pytest.raises(ValueError, match="share"):
        pruning.threshold(weights, 1.0)


def world():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.LayerNorm(16))


def test_three_rounds_zero_the_share_of_all_parameters_in_equal_steps():
    model, rounds = world(), []
    pruning.prune(model, lambda _model, _kept: None, share=0.4, rounds=3, after=rounds.append)
    # LayerNorm's bias and the like are zeros that pruning did not make.
    untouched = (model[1].bias == 0).sum() + (model[2].bias == 0).sum()
    total = sum(p.numel() for p in model.parameters())
    made = [r.zeros - float(untouched) / total for r in rounds]
    assert made == pytest.approx([0.4 / 3, 0.8 / 3, 0.4], abs=2 / total)


def test_what_is_pruned_stays_zero_while_the_rest_is_trained():
    model = world()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    moved = []

    def fine_tune(network, keep):
        before = network[1].weight.detach().clone()
        for _ in range(3):
            optimizer.zero_grad()
            network(torch.arange(50)).pow(2).mean().backward()
            optimizer.step()
            keep()
        moved.append(float((network[1].weight.detach() - before).abs().max()))

    masks = pruning.prune(model, fine_tune, share=0.4, rounds=2)
    for name, weight in pruning.prunable(model).items():
        assert bool((weight[~masks[name]] == 0).all()), name
    assert min(moved) > 0.01


def test_the_threshold_of_a_round_follows_what_training_made_of_the_weights():
    model, rounds = world(), []

    def grow(network, _keep):
        with torch.no_grad():
            network[1].weight.mul_(10.0)

    pruning.prune(model, grow, share=0.3, rounds=2, after=rounds.append)
    first, second = (r.thresholds["1.weight"] for r in rounds)
    assert second > 10 * first
