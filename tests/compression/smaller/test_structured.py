"""What leaves is what matters least, what stays computes as before, and it is really smaller."""

import pytest
import torch
from torch import nn

from compression.retrieval.network import RetrievalNetwork
from compression.smaller import structured
from tests.compression.rankers import config, history

SIZES = {"heads": 4, "ffn": 24}


def network(seed=0, **changes):
    torch.manual_seed(seed)
    return RetrievalNetwork(config(**(SIZES | changes))).eval()


def silence(made, *, head, channels):
    """Heads and channels that write nothing."""
    with torch.no_grad():
        for layer in made.layers:
            layer.attention.out.weight[:, 4 * head : 4 * head + 4] = 0
            layer.ffn.narrow.weight[:, channels] = 0


def test_heads_and_channels_that_write_nothing_leave_without_a_trace():
    made, given = network(), history([30, 12], 30)
    silence(made, head=2, channels=[1, 5, 20])
    before, parameters = made(given), sum(p.numel() for p in made.parameters())
    structured.shrink(made, heads=3, channels=21)
    assert torch.allclose(made(given), before, atol=1e-5)
    gone = 2 * (3 * (4 * 16 + 4) + 4 * 16 + 31 + 3 * (16 + 1 + 16))
    assert parameters - sum(p.numel() for p in made.parameters()) == gone


def test_what_writes_most_stays():
    made = network()
    attention, ffn = made.layers[0].attention, made.layers[0].ffn
    with torch.no_grad():
        attention.value.weight[4:8] *= 50
        ffn.widen.weight[7] *= 50
    assert int(structured.head_importance(attention).argmax()) == 1
    assert int(structured.channel_importance(ffn).argmax()) == 7


def test_shrunk_weights_are_loaded_into_a_network_of_full_size():
    made, given = network(), history([9], 30)
    structured.shrink(made, heads=2, channels=10)
    again = network(seed=1)
    structured.fit_to(again, made.state_dict())
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(given), made(given))


def test_a_shrunk_network_learns():
    made, given = network(), history([9], 30)
    structured.shrink(made, heads=2, channels=10)
    made(given).pow(2).sum().backward()
    assert all(p.grad is not None for p in made.parameters())


def test_no_head_at_all_is_refused():
    with pytest.raises(ValueError, match="between 1"):
        structured.shrink(network(), heads=0, channels=4)


def test_the_product_of_two_maps_is_the_nearest_of_its_rank():
    torch.manual_seed(0)
    linear, x = nn.Linear(20, 12), torch.randn(5, 20)
    whole = structured.factorised(linear, 12)
    assert torch.allclose(whole(x), linear(x), atol=1e-5)
    narrow = structured.factorised(linear, 4)
    assert sum(p.numel() for p in narrow.parameters()) == 4 * (20 + 12) + 12
    sizes = torch.linalg.svdvals(linear.weight)
    error = torch.linalg.matrix_norm(narrow[1].weight @ narrow[0].weight - linear.weight)
    assert float(error.detach()) == pytest.approx(float(sizes[4:].norm().detach()), rel=1e-4)


def test_layers_that_share_weights_are_counted_once_and_learn_together():
    made, given = network(layers=4), history([9], 30)
    one = sum(p.numel() for p in made.layers[0].parameters())
    before = sum(p.numel() for p in made.parameters())
    structured.share_layers(made, 2)
    assert before - sum(p.numel() for p in made.parameters()) == 2 * one
    assert made.layers[0] is made.layers[1] and made.layers[2] is made.layers[3] is not made.layers[0]
    made(given).pow(2).sum().backward()
    assert len(made.layers) == 4
