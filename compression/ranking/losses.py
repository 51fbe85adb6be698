"""Softmax over the whole catalogue towards what came next and what a teacher thinks of every item."""

from __future__ import annotations

import torch
from torch import Tensor

from compression.retrieval.losses import in_parts


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
    share · softmax(the teacher's logits), which are its states [N, e] times its table [V, e]; some rows at a
    time, products in `low`."""
    theirs = teacher[0].detach()
    their_across = teacher[1].detach().to(low).T.contiguous()

    def part(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        own = targets[rows, None]
        wanted = (theirs[rows].to(low) @ their_across).float().softmax(1).mul_(share)
        wanted.scatter_add_(1, own, torch.full(own.shape, 1.0 - share))
        normal = logits.logsumexp(1, keepdim=True)
        loss = normal.sum() - torch.dot(logits.flatten(), wanted.flatten())
        return loss, logits.sub_(normal).exp_().sub_(wanted)

    return in_parts(states, table, part, low=low)
