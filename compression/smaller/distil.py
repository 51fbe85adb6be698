"""Distillation: a student learns a teacher's attention maps (formula 3) and its opinions of candidates.

Student and teacher may differ in width, depth and heads: layers are matched by a mapping, and where heads
differ in number, maps are compared as means over heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_SMALLEST = 1e-9


def layer_mapping(student: int, teacher: int) -> list[int]:
    """By student layer the teacher layer it imitates: evenly spread, the last the last."""
    if not 1 <= student <= teacher:
        raise ValueError(f"a student of {student} layers cannot be matched with a teacher of {teacher}")
    return [(number + 1) * teacher // student - 1 for number in range(student)]


def map_divergence(student: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
    """KL(S_student ‖ S_teacher) of attention maps [B, heads, T, T] (formula 3): the mean over heads and over
    those `rows` [B, T] that are asked for. Where the teacher sees nothing the student is not asked either:
    both mask alike."""
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    ratio = student.clamp(min=_SMALLEST).log() - teacher.detach().clamp(min=_SMALLEST).log()
    divergence = (student * ratio).sum(-1).mean(1)
    return (divergence * rows).sum() / rows.sum().clamp(min=1)


def maps_divergence(student: Sequence[Tensor], teacher: Sequence[Tensor], rows: Tensor) -> Tensor:
    """The mean over the student's layers, each beside the teacher's it is matched with."""
    matched = layer_mapping(len(student), len(teacher))
    divergences = [
        map_divergence(own, teacher[other], rows) for own, other in zip(student, matched, strict=True)
    ]
    return torch.stack(divergences).mean()


def opinion_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) of softmaxes over the candidates in the last axis [N, C], mean over N, times
    the temperature squared so that gradients keep their size. A masked candidate is masked in both."""
    chances = F.log_softmax(teacher.detach() / temperature, -1)
    return F.kl_div(
        F.log_softmax(student / temperature, -1), chances, log_target=True, reduction="batchmean"
    ) * (temperature**2)
