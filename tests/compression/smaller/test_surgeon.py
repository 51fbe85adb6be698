"""What stays takes over what it can of what goes, and what can be done without goes first."""

import pytest
import torch
from torch import nn

from compression.retrieval.network import RetrievalNetwork
from compression.smaller import structured, surgeon
from tests.compression.rankers import config, history

SIZES = {"heads": 4, "ffn": 24}


def network(seed=0):
    torch.manual_seed(seed)
    made = RetrievalNetwork(config(**SIZES)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def seen_of(inputs):
    return surgeon.Moments(inputs.mean(0), torch.cov(inputs.T, correction=0))


def test_an_input_that_others_add_up_to_leaves_without_a_trace():
    torch.manual_seed(0)
    inputs = torch.randn(500, 6, dtype=torch.float64)
    inputs[:, 4] = 2.0 * inputs[:, 1] - inputs[:, 3] + 5.0
    linear = nn.Linear(6, 3)
    # Column 4 weighs most: by its norm it would have stayed.
    with torch.no_grad():
        linear.weight[:, 4] *= 30
        before = linear(inputs.float())
    stays = surgeon.eliminate(linear, seen_of(inputs), kept=5, groups=6)
    assert len(stays) == 5 and len({1, 3, 4} - set(stays.tolist())) == 1
    assert torch.allclose(linear(inputs.float()), before, atol=0.02 * float(before.std()))
    assert int((linear.weight == 0).all(0).sum()) == 1


def test_what_stays_is_the_least_squares_fit():
    torch.manual_seed(1)
    inputs = torch.randn(400, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64) + 1.0
    linear = nn.Linear(8, 3).double()
    outputs = linear(inputs).detach()
    stays = surgeon.eliminate(linear, seen_of(inputs), kept=2, groups=4)
    columns = (stays[:, None] * 2 + torch.arange(2)).flatten()
    known = torch.cat([inputs[:, columns], torch.ones(400, 1, dtype=torch.float64)], 1)
    best = known @ torch.linalg.lstsq(known, outputs).solution
    lost = (linear(inputs) - outputs).pow(2).sum()
    assert float(lost) == pytest.approx(float((best - outputs).pow(2).sum()), rel=0.05)


def test_less_is_lost_than_by_weights_alone():
    given = [history([30, 30, 25, 30], 30, seed=seed) for seed in range(6)]
    whole, ours, theirs = network(), network(), network()
    surgeon.shrink(ours, given, heads=2, channels=12)
    structured.shrink(theirs, heads=2, channels=12)
    assert [layer.attention.heads for layer in ours.layers] == [2, 2]
    assert [layer.ffn.widen.out_features for layer in ours.layers] == [12, 12]
    other = history([30, 30, 30], 30, seed=9)
    lost, by_weights = ((made(other) - whole(other)).pow(2).mean() for made in (ours, theirs))
    assert float(lost) < float(by_weights)


def test_padding_is_not_watched():
    made = network()
    outs = [layer.attention.out for layer in made.layers]
    padded = history([20], 30)
    bare = padded._replace(items=padded.items[:, :20])
    for ours, theirs in zip(*(surgeon.moments(made, outs, [one]) for one in (padded, bare)), strict=True):
        assert torch.allclose(ours.mean, theirs.mean, atol=1e-6)
        assert torch.allclose(ours.covariance, theirs.covariance, atol=1e-6)


def test_a_refitted_table_answers_its_users_better_than_one_cut_off():
    torch.manual_seed(2)
    users = torch.randn(1000, 12) @ torch.randn(12, 12)
    table = torch.randn(40, 12)
    mask = table.abs() >= 0.6
    refitted = table.clone()
    surgeon.refit(refitted, mask, (users.T @ users / 1000).double())
    assert torch.equal(refitted != 0, mask)
    wanted = users @ table.T
    cut, made = ((users @ one.T - wanted).pow(2).mean() for one in (table * mask, refitted))
    assert float(made) < 0.9 * float(cut)


@pytest.mark.parametrize("kept", [0, 5])
def test_as_many_stay_as_there_are_at_most(kept):
    linear = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="to keep"):
        surgeon.eliminate(linear, seen_of(torch.randn(9, 4).double()), kept=kept, groups=4)
