"""The network, its attention and its losses do what their formulas say."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from compression.attention.base import reach_bias
from compression.attention.dropout import ByteDropout
from compression.attention.full import FullAttention
from compression.evaluation.scoring import to_history
from compression.retrieval.losses import Negatives, full_softmax, shared_negatives
from compression.retrieval.network import NetworkConfig, RetrievalNetwork
from tests.compression.worlds import histories


def network(**changes):
    torch.manual_seed(3)
    fields = {"dim": 16, "heads": 2, "ffn": 32, "max_history": 30, "item_rows": 60}
    made = RetrievalNetwork(NetworkConfig(**(fields | changes))).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def test_attention_is_softmax_of_products_and_reach():
    torch.manual_seed(0)
    attention = FullAttention(8, heads=2).eval()
    x, reach = torch.randn(3, 5, 8), torch.randn(2, 9)
    attention.keep_map = True
    with torch.no_grad():
        out, seen = attention(x, reach)
        query, key, value = (linear(x) for linear in (attention.query, attention.key, attention.value))
        for batch in range(3):
            for head in range(2):
                part = slice(4 * head, 4 * head + 4)
                for asking in range(5):
                    logits = [
                        float(query[batch, asking, part] @ key[batch, one, part]) / 2
                        + float(reach[head, asking - one])
                        for one in range(asking + 1)
                    ]
                    expected = torch.tensor(logits).softmax(0)
                    torch.testing.assert_close(seen[batch, head, asking, : asking + 1], expected)
                    assert not seen[batch, head, asking, asking + 1 :].any()
        found = torch.einsum("bhqk,bkhd->bqhd", seen, value.unflatten(-1, (2, 4))).flatten(2)
        torch.testing.assert_close(out, attention.out(found))


def test_attention_that_is_not_causal_sees_everything_as_far_ahead_as_back():
    assert reach_bias(3, None, False, torch.device("cpu")) is None
    bias = reach_bias(3, torch.tensor([1.0, 2.0, 3.0]), False, torch.device("cpu"))
    assert bias.tolist() == [[1, 2, 3], [2, 1, 2], [3, 2, 1]]
    attention = FullAttention(8, heads=2).eval()
    attention.keep_map = True
    assert (attention(torch.randn(1, 4, 8), None, False)[1] > 0).all()
    with pytest.raises(ValueError, match="heads"):
        FullAttention(8, heads=3)


@pytest.mark.parametrize("changes", [{}, {"activation": "swiglu", "behaviors": True, "gaps": True}])
def test_what_comes_later_and_padding_change_nothing(changes):
    made = network(positions=False, **changes)
    long = histories([20, 7], 30)
    short = histories([20, 7], 20)
    with torch.inference_mode():
        all_of_it = made(to_history(long))
        torch.testing.assert_close(made(to_history(short))[0], all_of_it[0, :20], atol=1e-5, rtol=0)
        long.items[0, 10:20] = 1
        torch.testing.assert_close(made(to_history(long))[0, :10], all_of_it[0, :10], atol=1e-5, rtol=0)


def test_user_vectors_are_the_states_at_the_newest_events():
    made = network()
    arrays = to_history(histories([20, 1, 7], 30))
    with torch.inference_mode():
        states, vectors = made(arrays), made.user_vectors(arrays)
    for user, length in enumerate((20, 1, 7)):
        torch.testing.assert_close(vectors[user], states[user, length - 1])


def test_maps_are_there_for_those_who_ask():
    made = network(layers=2)
    made.layers[1].attention.keep_map = True
    with torch.inference_mode():
        _, (first, second) = made.states(to_history(histories([5, 3], 6)))
    assert first is None and second.shape == (2, 2, 6, 6)


def test_full_softmax_is_cross_entropy_with_its_gradients():
    torch.manual_seed(1)
    states = torch.randn(1100, 8, requires_grad=True)
    table = torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(0, 50, (1100,))
    plain = F.cross_entropy(states @ table.T, targets)
    expected = torch.autograd.grad(3 * plain, (states, table))
    loss = full_softmax(states, table, targets, low=torch.float32)
    torch.testing.assert_close(loss, plain)
    for got, wanted in zip(torch.autograd.grad(3 * loss, (states, table)), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)
    rough = torch.autograd.grad(full_softmax(states, table, targets, low=torch.bfloat16), (states, table))
    torch.testing.assert_close(3 * rough[1], expected[1], atol=0.02 * float(expected[1].abs().max()), rtol=0)


def test_shared_negatives_are_corrected_and_never_the_target():
    states, table = torch.zeros(2, 4), torch.zeros(5, 4)
    log_expected = torch.log(torch.tensor([0.5, 1.0, 2.0, 1.0, 1.0]))
    loss = shared_negatives(states, table, torch.tensor([0, 2]), torch.tensor([2, 2, 1]), log_expected)
    # Chances 1/0.5 against 1/2, 1/2 and 1; then 1/2 against 1, for item 2 is the target.
    expected = -(np.log(2 / (2 + 0.5 + 0.5 + 1)) + np.log(0.5 / (0.5 + 1))) / 2
    assert float(loss) == pytest.approx(expected, abs=1e-5)


def test_negatives_are_drawn_as_often_as_is_said():
    drawn = Negatives(np.array([16, 1, 0, 81]), 40_000)
    often = np.bincount(drawn.draw(np.random.default_rng(0)).numpy(), minlength=4)
    assert often == pytest.approx(np.exp(drawn.log_expected.numpy()), rel=0.05)


def test_dropout_drops_what_it_says_and_keeps_the_mean():
    torch.manual_seed(0)
    dropout, ones = ByteDropout(0.25), torch.ones(400_003)
    dropped = dropout(ones)
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.005)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.01)
    assert dropout.eval()(ones) is ones
    with pytest.raises(ValueError, match="nothing"):
        ByteDropout(1.0)
