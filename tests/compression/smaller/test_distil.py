"""Formula 3 and its companions."""

import math

import pytest
import torch
from torch.nn import functional as F

from compression.smaller import distil


def test_layers_are_matched_evenly_and_the_last_with_the_last():
    assert distil.layer_mapping(2, 4) == [1, 3]
    assert distil.layer_mapping(1, 4) == [3]
    assert distil.layer_mapping(3, 4) == [0, 1, 3]
    with pytest.raises(ValueError, match="matched"):
        distil.layer_mapping(3, 2)


def test_the_divergence_of_maps_is_the_students_entropy_against_the_teachers():
    student = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
    teacher = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    both, second = torch.ones(1, 2), torch.tensor([[0.0, 1.0]])
    assert float(distil.map_divergence(student, teacher, both)) == pytest.approx(expected / 2)
    assert float(distil.map_divergence(student, teacher, second)) == pytest.approx(expected)
    assert float(distil.map_divergence(teacher, teacher, both)) == 0.0


def test_maps_of_different_head_counts_are_compared_as_means():
    torch.manual_seed(0)
    teacher = torch.randn(2, 4, 5, 5).softmax(-1)
    student = teacher.mean(1, keepdim=True).repeat(1, 2, 1, 1)
    assert float(distil.map_divergence(student, teacher, torch.ones(2, 5))) == pytest.approx(0.0, abs=1e-6)


def test_opinions_agree_where_logits_differ_by_a_constant_only():
    torch.manual_seed(0)
    teacher = torch.randn(6, 9)
    assert float(distil.opinion_divergence(teacher + 3.0, teacher, 2.0)) == pytest.approx(0.0, abs=1e-6)
    other = torch.randn(6, 9)
    p, q = F.softmax(teacher, -1), F.softmax(other, -1)
    expected = (p * (p / q).log()).sum(-1).mean()
    assert float(distil.opinion_divergence(other, teacher)) == pytest.approx(float(expected), rel=1e-4)


def test_learning_from_maps_and_opinions_leads_to_the_teacher_and_leaves_it_alone():
    torch.manual_seed(1)
    teacher = [torch.randn(2, 2, 6, 6).requires_grad_() for _ in range(4)]
    student = [torch.randn(2, 2, 6, 6, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.Adam(student, lr=0.1)
    first = None
    for _ in range(200):
        loss = distil.maps_divergence(
            [one.softmax(-1) for one in student], [one.softmax(-1) for one in teacher], torch.ones(2, 6)
        )
        first = first or float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.02 * first
    assert all(one.grad is None for one in teacher)
    last = student[1].softmax(-1) - teacher[3].softmax(-1)
    assert float(last.detach().abs().max()) < 0.1
