"""What serving relies on: nothing but the user and the candidate moves a score."""

import numpy as np
import pytest
import torch

from compression.evaluation.scoring import to_history
from compression.training.model import History
from tests.compression.worlds import histories, model, scores

LENGTHS = [0, 1, 7, 25]


def draw_candidates(users, count, seed=5):
    rng = np.random.default_rng(seed)
    return rng.integers(1, 60, (users, count)), rng.integers(1, 12, (users, count))


def test_a_candidate_scores_the_same_whatever_stands_beside_it():
    network, arrays = model(), histories(LENGTHS, 25)
    items, categories = draw_candidates(4, 30)
    _, together = scores(network, arrays, items, categories)
    order = np.random.default_rng(1).permutation(30)
    _, shuffled = scores(network, arrays, items[:, order], categories[:, order])
    assert torch.allclose(together[:, order], shuffled, atol=1e-5)
    for at in (0, 17):
        _, alone = scores(network, arrays, items[:, at : at + 1], categories[:, at : at + 1])
        assert torch.allclose(together[:, at : at + 1], alone, atol=1e-5)


def test_padding_and_the_rest_of_the_batch_change_nothing():
    network = model()
    items, categories = draw_candidates(4, 10)
    small, in_small = scores(network, histories(LENGTHS, 25), items, categories)
    large, in_large = scores(network, histories(LENGTHS, 100), items, categories)
    assert torch.allclose(in_small, in_large, atol=1e-5)
    assert torch.allclose(small.user_vector, large.user_vector, atol=1e-5)
    _, alone = scores(network, histories(LENGTHS[:3], 25), items[:3], categories[:3])
    assert torch.allclose(in_small[:3], alone, atol=1e-5)


def test_what_stands_in_padding_slots_is_never_looked_at():
    network, arrays = model(), histories(LENGTHS, 40)
    items, categories = draw_candidates(4, 10)
    _, clean = scores(network, arrays, items, categories)
    for column in (arrays.items, arrays.categories, arrays.behaviors, arrays.gaps):
        column[np.arange(40) >= arrays.lengths[:, None]] = 3
    _, dirty = scores(network, arrays, items, categories)
    assert torch.allclose(clean, dirty, atol=1e-5)


def test_an_appended_event_leaves_the_states_before_it_as_they_were():
    network = model()
    items, categories = draw_candidates(1, 5)
    before, first = scores(network, histories([12], 25), items, categories)
    after, second = scores(network, histories([13], 25), items, categories)
    for old, new in zip(before.states, after.states, strict=True):
        assert torch.allclose(old[:, :12], new[:, :12], atol=1e-5)
        assert not torch.allclose(old[:, 12], new[:, 12], atol=1e-3)
    assert not torch.allclose(first, second, atol=1e-3)


def test_a_history_appended_to_event_by_event_is_as_if_encoded_whole():
    network, whole = model(), histories([14, 100, 1], 100)
    history = to_history(whole)
    with torch.inference_mode():
        expected = network.encode(history)
        states = [torch.full_like(state, 7.0) for state in expected.states]
        for place in range(100):
            at = torch.full((3,), place, dtype=torch.int32)
            event = History(*(column[:, place : place + 1] for column in history[:4]), at)
            found = network.append(states, event)
            for state, new in zip(states, found.states, strict=True):
                state[:, place] = new[:, 0]
            done = whole.lengths == place + 1
            assert torch.allclose(found.user_vector[done], expected.user_vector[done], atol=1e-5)
    for ours, theirs in zip(states, expected.states, strict=True):
        for user, length in enumerate(whole.lengths):
            assert torch.allclose(ours[user, :length], theirs[user, :length], atol=1e-5)


def test_in_training_no_position_sees_what_comes_after_it():
    network = model()
    arrays, changed = histories([20], 20), histories([20], 20)
    changed.items[0, 12:] = 7
    vectors = network.item_vectors(torch.tensor([[5, 5]]), torch.tensor([[2, 2]]))
    seen = torch.tensor([[12, 13]])
    with torch.inference_mode():
        users, states = network(to_history(arrays), vectors, seen)
        other_users, other_states = network(to_history(changed), vectors, seen)
    assert torch.allclose(users[:, :12], other_users[:, :12], atol=1e-5)
    assert torch.allclose(states[:, 0], other_states[:, 0], atol=1e-5)
    assert not torch.allclose(states[:, 1], other_states[:, 1], atol=1e-3)


def test_training_and_serving_compute_the_same_scores():
    network, arrays = model(), histories([20], 20)
    rows, categories = torch.tensor([[5, 9, 31]]), torch.tensor([[2, 3, 4]])
    with torch.inference_mode():
        vectors = network.item_vectors(rows, categories)
        users, states = network(to_history(arrays), vectors, torch.full((1, 3), 20))
        trained = network.readout_scores(states, vectors, users[:, 19:20])
    encoded, served = scores(network, arrays, rows.numpy(), categories.numpy())
    assert torch.allclose(users[:, 19], encoded.user_vector, atol=1e-5)
    assert torch.allclose(trained, served, atol=1e-4)


def test_a_user_without_history_gets_finite_scores_that_differ_by_item():
    network = model()
    encoded, answer = scores(network, histories([0, 0], 25), [[1, 2, 3]] * 2, [[1, 1, 2]] * 2)
    assert torch.isfinite(answer).all() and torch.isfinite(encoded.user_vector).all()
    assert torch.allclose(answer[0], answer[1], atol=1e-5)
    assert len(set(answer[0].tolist())) == 3


def test_history_and_behaviour_move_the_scores():
    network, arrays = model(), histories([10], 25)
    _, before = scores(network, arrays, [[4, 5]], [[1, 1]])
    arrays.behaviors[0, 9] = 1 + arrays.behaviors[0, 9] % 4
    _, after = scores(network, arrays, [[4, 5]], [[1, 1]])
    assert not torch.allclose(before, after, atol=1e-4)


def test_how_far_back_an_event_lies_moves_the_scores():
    network, arrays = model(), histories([5], 5)
    encoded, before = scores(network, arrays, [[4, 5]], [[1, 1]])
    turned = encoded._replace(states=tuple(state.flip(1) for state in encoded.states))
    items, categories = torch.tensor([[4, 5]]), torch.tensor([[1, 1]])
    with torch.inference_mode():
        after = network.score(turned, torch.from_numpy(arrays.lengths), items, categories)
        for block in network.blocks:
            block.candidate_reach.zero_()
        either_way = [network.score(e, torch.tensor([5]), items, categories) for e in (encoded, turned)]
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.allclose(*either_way, atol=1e-5)


def test_a_network_of_several_heads_is_refused():
    with pytest.raises(ValueError, match="one head"):
        model(heads=2)
