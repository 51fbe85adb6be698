"""Stages: where each begins, what its lesson asks, and what it counts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from compression.evaluation.scoring import to_history
from compression.smaller import compress
from compression.smaller.lessons import Rounded, Taught
from compression.smaller.plan import PLANS, Compression
from compression.smaller.student import keep_channels, student
from compression.training.lesson import Asked
from compression.training.model import Recommender
from compression.training.weights import TABLE_GRID, codes, read, write
from tests.compression.worlds import histories, model, scores

LENGTHS = [0, 1, 7, 25]
ITEMS = np.random.default_rng(5).integers(1, 60, (4, 30))
CATEGORIES = np.random.default_rng(6).integers(1, 12, (4, 30))


def answers(network):
    encoded, found = scores(network, histories(LENGTHS, 25), ITEMS, CATEGORIES)
    return encoded.user_vector, found


def built(weights, like, **sizes):
    network = Recommender(like.shape.model_copy(update=sizes))
    network.load_state_dict(weights)
    return network.eval()


@torch.no_grad()
def half_empty(network):
    """The network with all it does in the first half of its dimensions."""
    half = network.shape.dim // 2
    for name, tensor in network.named_parameters():
        if name.split(".")[0] in ("items", "categories", "behaviors", "gaps"):
            tensor[:, half:] = 0
        elif name.endswith(("key.weight", "value.weight", "narrow.weight", "no_history", "nothing_value")):
            tensor[half:] = 0
    network.final_norm.weight.fill_(0.7)
    return network


def test_a_student_of_the_same_sizes_begins_as_its_teacher():
    teacher = model()
    same = built(student(teacher, teacher.shape), teacher)
    for ours, theirs in zip(answers(same), answers(teacher), strict=True):
        assert torch.equal(ours, theirs)


def test_a_narrow_student_begins_as_a_teacher_that_uses_no_more_dimensions():
    teacher = half_empty(model())
    shape = teacher.shape.model_copy(update={"dim": 8})
    narrow = built(student(teacher, shape), teacher, dim=8)
    assert torch.allclose(answers(narrow)[1], answers(teacher)[1], atol=1e-4)


def test_a_student_with_fewer_layers_has_those_it_is_matched_with():
    teacher = model()
    begun = student(teacher, teacher.shape.model_copy(update={"layers": 1}))
    assert torch.equal(begun["blocks.0.key.weight"], teacher.blocks[1].key.weight)
    assert not any(name.startswith("blocks.1") for name in begun)
    with pytest.raises(ValueError, match="wider"):
        student(teacher, teacher.shape.model_copy(update={"dim": 32}))


def test_channels_that_write_nothing_leave_and_nobody_misses_them():
    teacher = model()
    with torch.no_grad():
        for block in teacher.blocks:
            block.narrow.weight[:, 1::2] = 0
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    smaller = built(keep_channels(before, 16), teacher, ffn=16)
    for ours, theirs in zip(answers(smaller), answers(teacher), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(("ffn", "kept", "left"), [(120, 0.25, [90, 60, 30]), (64, 0.5, [53, 43, 32])])
def test_rounds_take_equal_shares_of_what_was_there_at_first(ffn, kept, left):
    plan = Compression(kept_channels=kept)
    assert [compress.pruned_channels(ffn, plan, number) for number in (1, 2, 3)] == left


def asked_of(network):
    arrays = histories([7, 25], 25)
    rng = np.random.default_rng(2)
    rows = torch.from_numpy(rng.integers(1, 60, (2, 6)))
    turn = torch.tensor([[2, 6], [10, 24]])
    asked = Asked(
        to_history(arrays),
        rows,
        torch.from_numpy(rng.integers(1, 12, (2, 6))),
        (turn + 1).repeat_interleave(3, 1),
        turn,
        torch.arange(25) < torch.tensor([[7], [25]]),
        50,
        torch.from_numpy(rng.integers(1, 12, 60)),
    )
    vectors = network.item_vectors(asked.rows, asked.categories)
    users, states = network(asked.history, vectors, asked.seen)
    at = turn[..., None].expand(-1, -1, users.shape[-1])
    return asked, users, network.readout_scores(states, vectors, users.gather(1, at).repeat_interleave(3, 1))


@pytest.mark.parametrize("plan", [Compression(opinions=0.0, maps=1.0), Compression(opinions=1.0, maps=0.0)])
def test_a_lesson_has_nothing_to_say_to_its_own_teacher_and_much_to_others(plan):
    teacher, other = model(), model(seed=1, dim=8, layers=1)
    for network, least, most in ((model(), -1e-6, 1e-5), (other, 0.05, 1e3)):
        lesson = Taught(teacher, plan)
        lesson.begin(network)
        asked, users, found = asked_of(network)
        loss = lesson.loss(network, asked, users, found)
        assert least <= float(loss.detach()) <= most
        loss.backward()
        assert all(parameter.grad is None for parameter in teacher.parameters())
        lesson.end(network)
        assert all(block.maps is None for block in (*network.blocks, *teacher.blocks))


def test_rounding_leaves_tables_on_their_grid_and_is_done_once():
    network = model()
    before = network.items.weight.detach().clone()
    lesson = Rounded(model(), Compression())
    lesson.begin(network)
    lesson.end(network)
    counted, step = codes(network.items.weight)
    assert torch.equal(counted.float() * step, network.items.weight)
    worst = (network.items.weight - before).abs().amax(1, keepdim=True)
    assert (worst <= 0.51 * before.abs().amax(1, keepdim=True) / 127).all() and worst.max() > 0
    assert int(counted.abs().max()) == 127 and TABLE_GRID.symmetric


def test_stored_weights_come_back_and_rounded_ones_take_a_quarter(tmp_path):
    network = model(item_rows=2_000)
    lesson = Rounded(model(), Compression())
    lesson.begin(network)
    lesson.end(network)
    for rounded in (False, True):
        write(tmp_path / str(rounded), network.state_dict(), rounded=rounded)
        found = read((tmp_path / str(rounded)).read_bytes())
        assert found.keys() == network.state_dict().keys()
        for name, tensor in network.state_dict().items():
            assert torch.equal(found[name], tensor)
    sizes = [(tmp_path / str(rounded)).stat().st_size for rounded in (False, True)]
    assert sizes[1] < 0.45 * sizes[0]
    with pytest.raises(ValueError, match="eader"):
        read(b"12345678")


def test_a_plan_names_its_stages_in_order():
    assert PLANS["none"].stages == ()
    assert PLANS["all"].stages == ("distil", "prune-1", "prune-2", "prune-3", "quantize")
    assert replace(PLANS["prune"], rounds=1).stages == ("prune-1",)


def test_work_is_counted_as_torch_counts_it():
    network = model()
    arrays = histories([100], 100)
    items, categories = ITEMS[:1].repeat(2, 1)[:, :50], CATEGORIES[:1].repeat(2, 1)[:, :50]
    with FlopCounterMode(display=False) as counter:
        scores(network, arrays, items, categories)
    affinity = 2 * 50 * network.shape.dim  # a sum of products, which is no product of matrices to torch
    assert compress.list_flops(network.shape) == counter.get_total_flops() + affinity
