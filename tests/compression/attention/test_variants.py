"""What every way to attend promises: its formulas, causality, finite gradients, a map that is one."""

from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from compression.attention import sparse
from compression.attention.full import FullAttention
from compression.attention.grouped import GroupedLinear
from compression.attention.int8 import Int8Attention, Int8Linear
from compression.attention.low_rank import LowRankLinear
from compression.attention.variants import all_variants, hybrid_sparse


@dataclass(frozen=True)
class Sizes:
    dim: int = 32
    heads: int = 2
    dropout: float = 0.0


SIZES = Sizes()
VARIANTS = {variant.name: variant for variant in all_variants()}
every = pytest.mark.parametrize("name", VARIANTS)


def built(name, sizes=SIZES):
    torch.manual_seed(0)
    return VARIANTS[name].build(sizes)


@every
def test_parameters_are_what_the_formula_says(name):
    module = built(name)
    assert sum(p.numel() for p in module.parameters()) == VARIANTS[name].parameters(SIZES)


@every
@pytest.mark.parametrize("length", [40, 100])
def test_work_is_what_the_formula_says(name, length):
    # With gradients on, so that the counter sees the products of int8 as floats.
    module, x = built(name).eval(), torch.randn(1, length, SIZES.dim)
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() == VARIANTS[name].flops(SIZES, length)


@every
def test_no_event_sees_what_comes_after_it(name):
    module, x = built(name).eval(), torch.randn(2, 30, SIZES.dim)
    changed = x.clone()
    changed[:, 20:] += 1.0
    reach = torch.randn(SIZES.heads, 30)
    with torch.enable_grad():
        before, after = (module(given, reach)[0].detach() for given in (x, changed))
    # int8 values have a step per channel over the whole history, so the future moves them by a rounding.
    close = 2e-3 if name == "int8" else 1e-6
    assert torch.allclose(before[:, :20], after[:, :20], atol=close)
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-2 * float(before.abs().mean()))


@every
def test_without_causality_the_past_sees_the_future(name):
    module, x = built(name).eval(), torch.randn(1, 30, SIZES.dim)
    changed = x.clone()
    changed[:, 20:] += 3.0
    before, after = (module(given, None, False)[0].detach() for given in (x, changed))
    assert not torch.allclose(before[:, 19], after[:, 19], atol=1e-3 * float(before.abs().mean()))


@every
def test_the_map_sums_to_one_looks_back_only_and_follows_reach(name):
    module, x = built(name).eval(), torch.randn(1, 24, SIZES.dim)
    assert module(x)[1] is None
    module.keep_map = True
    seen = module(x)[1]
    assert seen.shape == (1, SIZES.heads, 24, 24)
    assert torch.allclose(seen.sum(-1), torch.ones(1, SIZES.heads, 24), atol=1e-5)
    assert float(seen.detach().triu(1).abs().max()) == 0.0
    reach = torch.zeros(24)
    reach[1] = 9.0
    drawn = module(x, reach)[1].detach().diagonal(-1, 2, 3)
    assert float(drawn.min()) > 0.9


@every
def test_every_parameter_learns(name):
    module = built(name).train()
    module(torch.randn(2, 12, SIZES.dim))[0].pow(2).mean().backward()
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), parameter_name
        # A key's bias moves all logits of a row alike, which softmax does not see.
        if "key" not in parameter_name or parameter.ndim > 1:
            assert float(parameter.grad.abs().max()) > 0, parameter_name


def test_grouped_and_low_rank_projections_are_the_matrix_they_say():
    torch.manual_seed(1)
    x = torch.randn(3, 7, 12)
    for linear in (GroupedLinear(12, 3), LowRankLinear(12, 2, 2)):
        assert torch.allclose(linear(x), x @ linear.matrix().T + linear.bias, atol=1e-6)
    blocks = GroupedLinear(12, 3).matrix()
    assert int((blocks != 0).sum()) == 3 * 16
    assert int(torch.linalg.matrix_rank(LowRankLinear(12, 2, 2).matrix()[:6])) == 2


def test_a_window_as_long_as_the_history_is_full_attention():
    sparse_one, x = hybrid_sparse(30).build(SIZES), torch.randn(2, 30, SIZES.dim)
    reach = torch.randn(SIZES.heads, 30)
    for causal in (True, False):
        expected = sparse_one.dense(x, reach, causal)[0]
        assert torch.allclose(sparse_one(x, reach, causal)[0], expected, atol=1e-5)


@pytest.mark.parametrize("sampling", ["fixed", "random"])
def test_an_event_looks_at_its_window_and_log_many_others_none_twice(sampling):
    places, there = sparse.neighbours(100, 16, True, sampling, 3)
    assert places.shape == (100, 16 + 7)
    for event in (0, 5, 15, 16, 50, 99):
        seen = places[event][there[event]].tolist()
        assert len(seen) == len(set(seen)) == min(event + 1, 16 + 7)
        assert set(range(max(0, event - 15), event + 1)) <= set(seen) <= set(range(event + 1))


def test_random_samples_are_the_seeds_and_reach_far():
    one, other = (sparse.neighbours(100, 4, True, "random", seed)[0] for seed in (1, 2))
    assert not torch.equal(one, other)
    sparse.neighbours.cache_clear()
    assert torch.equal(one, sparse.neighbours(100, 4, True, "random", 1)[0])
    assert int(one[99, 4:].min()) < 40


def test_integers_give_what_rounded_floats_give():
    torch.manual_seed(2)
    module, x = Int8Attention(32, 2).eval(), torch.randn(3, 20, 32)
    with torch.enable_grad():
        simulated = module(x)[0].detach()
    with torch.no_grad():
        integers = module(x)[0]
    assert torch.allclose(simulated, integers, atol=1e-5)


def test_eight_bits_come_close_to_full_precision():
    torch.manual_seed(2)
    module, x = Int8Attention(64, 4).eval(), torch.randn(3, 50, 64)
    plain = FullAttention(64, 4).eval()
    plain.load_state_dict(module.state_dict())
    with torch.no_grad():
        exact, coarse = plain(x)[0], module(x)[0]
    assert float((exact - coarse).norm() / exact.norm()) < 0.03


def test_a_narrow_value_channel_keeps_its_levels_beside_a_wide_one():
    module, x = Int8Attention(8, 1).eval(), torch.randn(1, 50, 8)
    with torch.no_grad():
        for linear in (module.value, module.out):
            linear.weight.copy_(torch.eye(8))
        module.query.weight.zero_()
        module.value.weight[0, 0] = 1e4
        plain = FullAttention(8, 1).eval()
        plain.load_state_dict(module.state_dict())
        plain.out = module.out = torch.nn.Identity()
        exact, coarse = plain(x)[0], module(x)[0]
        error = (exact - coarse)[..., 1:].norm() / exact[..., 1:].norm()
    assert float(error) < 0.03


def test_integer_maps_multiply_integers():
    called = set()

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(str(func))
            return func(*args, **(kwargs or {}))

    linear = Int8Linear(16, 16).eval()
    with torch.no_grad(), Calls():
        linear(torch.randn(18, 16))
    assert "aten._int_mm.default" in called and "aten.addmm.default" not in called


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: VARIANTS["low-rank, r = 4"].build(Sizes(dim=4, heads=2)), "rank"),
        (lambda: VARIANTS["grouped, k = 4"].build(Sizes(dim=6)), "groups"),
        (lambda: hybrid_sparse(0).build(SIZES), "window"),
    ],
)
def test_settings_that_make_no_sense_are_refused(build, said):
    with pytest.raises(ValueError, match=said):
        build()
