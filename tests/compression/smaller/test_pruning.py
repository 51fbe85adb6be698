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


def test_what_is_pruned_stays_zero_while_the_rest_is_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.LayerNorm(16))
    matrices = pruning.prunable(model)
    assert set(matrices) == {"0.weight", "1.weight"}
    masks = {name: pruning.mask(one, pruning.threshold(one, 0.4)) for name, one in matrices.items()}
    pruning.apply(model, masks)
    before = {name: one.detach().clone() for name, one in matrices.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(50)).pow(2).mean().backward()
        optimizer.step()
        pruning.apply(model, masks)
    for name, weight in matrices.items():
        assert bool((weight[~masks[name]] == 0).all()), name
        assert float((weight == 0).float().mean()) == pytest.approx(0.4, abs=0.01)
        assert float((weight.detach() - before[name])[masks[name]].abs().max()) > 0.01
