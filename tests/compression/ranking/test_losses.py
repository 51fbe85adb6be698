"""A taught softmax is cross-entropy towards target and teacher, gradients and all."""

import pytest
import torch
from torch.nn import functional as F

from compression.ranking.losses import taught_softmax
from compression.retrieval.losses import full_softmax


def _given(rows=1_100, items=37):
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(rows, 8, generator=generator, requires_grad=True)
    table = torch.randn(items, 8, generator=generator, requires_grad=True)
    teacher = torch.randn(rows, 12, generator=generator), torch.randn(items, 12, generator=generator)
    return states, table, torch.randint(0, items, (rows,), generator=generator), teacher


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_it_is_the_plain_formula_with_its_gradients(share):
    states, table, targets, teacher = _given()
    loss = taught_softmax(states, table, targets, teacher, share=share, low=torch.float32)
    wanted = share * (teacher[0] @ teacher[1].T).softmax(1)
    wanted += (1 - share) * F.one_hot(targets, len(table))
    plain = -(wanted * (states @ table.T).log_softmax(1)).sum(1).mean()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    ours = torch.autograd.grad(3 * loss, (states, table))
    theirs = torch.autograd.grad(3 * plain, (states, table))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_without_a_share_of_the_teachers_it_is_the_softmax_over_the_catalogue():
    states, table, targets, teacher = _given()
    taught = taught_softmax(states, table, targets, teacher, share=0.0, low=torch.float32)
    assert taught.item() == pytest.approx(full_softmax(states, table, targets, low=torch.float32).item())
