"""Softmax over the whole catalogue towards what came next and what a teacher thinks of every item."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS: Final = 512  # states at a time, as in `compression.retrieval.losses`


def taught_softmax(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    teacher: tuple[Tensor, Tensor],
    *,
    share: float,
    low: torch.dtype,
) -> Tensor:
    """Mean cross-entropy of the logits states [N, d] · table [V, d] towards (1 - share) · target +
    share · softmax(the teacher's logits), which are its states [N, e] times its table [V, e]; made some rows
    at a time with their gradients, products in `low`."""
    theirs, their_table = teacher
    loss: Tensor = _TaughtSoftmax.apply(  # type: ignore[no-untyped-call]
        states, table, targets, theirs.detach(), their_table.detach(), share, low
    )
    return loss


class _TaughtSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        table: Tensor,
        targets: Tensor,
        theirs: Tensor,
        their_table: Tensor,
        share: float,
        low: torch.dtype,
    ) -> Tensor:
        items, across = table.to(low), table.to(low).T.contiguous()
        their_across = their_table.to(low).T.contiguous()
        of_states, of_table = torch.empty(states.shape), torch.zeros(table.shape)
        loss = torch.zeros(())
        for start in range(0, len(states), _ROWS):
            part = states[start : start + _ROWS].to(low)
            own = targets[start : start + _ROWS, None]
            wanted = (theirs[start : start + _ROWS].to(low) @ their_across).float().softmax(1).mul_(share)
            wanted.scatter_add_(1, own, torch.full(own.shape, 1.0 - share))
            logits = (part @ across).float()
            normal = logits.logsumexp(1, keepdim=True)
            loss += normal.sum() - torch.dot(logits.flatten(), wanted.flatten())
            error = logits.sub_(normal).exp_().sub_(wanted).to(low)
            of_states[start : start + _ROWS] = error @ items
            of_table += error.T @ part
        count = max(1, len(states))
        ctx.save_for_backward(of_states.div_(count), of_table.div_(count))
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None, None, None, None, None]:
        of_states, of_table = ctx.saved_tensors
        return of_states * outer[0], of_table * outer[0], None, None, None, None, None
