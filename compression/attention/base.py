"""What a layer of the retrieval network asks of its attention."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

HIDDEN = -1e9
"""Added to the logit of what must not be looked at."""


class Attention(nn.Module):
    """Self-attention over right-padded histories, projections and all; norm and residual are the layer's.

    `attention(x, reach, causal)` takes x [B, L, d] and answers (out [B, L, d], map [B, heads, L, L] or
    None). `reach` [L] or [heads, L], or None: what is added to the logit of an event by how many events
    back it lies, 0 for itself. Causal: an event sees itself and those before it, so padding, which comes
    after, is never looked at; otherwise every slot sees every slot, padding included.

    The map (rows sum to one, before dropout) is made where `keep_map` is set, for distillation, and by
    variants that have none it is None all the same.
    """

    keep_map: bool = False

    @abstractmethod
    def forward(
        self, x: Tensor, reach: Tensor | None = None, causal: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError


def reach_bias(length: int, reach: Tensor | None, causal: bool, device: torch.device) -> Tensor | None:
    """[L, L] or [heads, L, L]: what is added to the logits of L events that ask about L; None: nothing.

    Without `causal` an event that lies ahead counts as far as one as far back.
    """
    if reach is None and not causal:
        return None
    slots = torch.arange(length, device=device)
    back = slots[:, None] - slots[None, :]
    if reach is None:
        bias = torch.zeros(length, length, device=device)
    else:
        bias = reach[..., back.abs() if not causal else back.clamp(min=0)]
    return bias.masked_fill(back < 0, HIDDEN) if causal else bias
