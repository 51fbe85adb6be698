"""A teacher is asked about a window once, and answers as it would each time."""

import pytest
import torch

from compression.ranking.opinions import KeptStates
from compression.retrieval.network import NetworkConfig, RetrievalNetwork
from compression.training.model import History

CONFIG = NetworkConfig(dim=8, layers=2, heads=2, ffn=16, max_history=6, item_rows=50)


@pytest.fixture
def network():
    torch.manual_seed(1)
    return RetrievalNetwork(CONFIG).eval()


@pytest.fixture
def asked(network):
    """Lengths of the windows that the network was asked about."""
    seen = []
    network.register_forward_pre_hook(lambda _, given: seen.append(given[0].lengths.tolist()))
    return seen


def test_only_windows_that_are_new_are_computed(network, asked):
    states = KeptStates(network, torch.float32)
    first, both = windows([[3, 4, 5]]), windows([[7, 8, 9, 10], [3, 4, 5], [3, 4]])
    assert torch.allclose(states(first), network(first), atol=1e-6)
    assert torch.allclose(inside(states(both), both), inside(network(both), both), atol=1e-6)
    assert asked == [[3], [3], [4, 2], [4, 3, 2]]
    assert torch.equal(states(both), states(both)) and len(asked) == 4
    assert states(both)[1, 3:].abs().sum() == 0


def test_without_room_all_is_computed_each_time(network, asked):
    states = KeptStates(network, torch.float32, most_bytes=3 * CONFIG.dim * 4)
    both = windows([[3, 4, 5], [7, 8, 9]])
    states(both)
    assert torch.allclose(states(both), network(both), atol=1e-6)
    assert asked == [[3, 3], [3], [3, 3]]


def test_a_network_that_sees_more_than_items_is_refused():
    with pytest.raises(ValueError, match="sees more"):
        KeptStates(RetrievalNetwork(CONFIG.model_copy(update={"gaps": True})), torch.float32)


def windows(rows):
    lengths = torch.tensor([len(row) for row in rows])
    items = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return History(items, *[torch.zeros_like(items)] * 3, lengths)


def inside(states, history):
    return states[torch.arange(states.shape[1]) < history.lengths[:, None]]
