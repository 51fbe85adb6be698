"""INT8 attention: 8-bit weights and activations, the Value branch by its own dynamic range (III.A, 6)."""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from compression.attention.full import FullAttention

LEVELS: Final = 127
_SMALLEST: Final = 1e-12


def scale_of(x: Tensor, axis: int) -> Tensor:
    """The step with which the largest |x| along an axis is 127 steps; kept as an axis of size 1."""
    return x.detach().abs().amax(axis, keepdim=True).clamp(min=_SMALLEST) / LEVELS


def codes(x: Tensor, scale: Tensor) -> Tensor:
    """Whole numbers from -127 to 127, as floats."""
    return (x.detach() / scale).round().clamp(-LEVELS, LEVELS)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int) -> Tensor:
        scale = scale_of(x, axis)
        return codes(x, scale) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def rounded(x: Tensor, axis: int) -> Tensor:
    """What 8 bits along an axis leave of x; gradients pass untouched."""
    return cast(Tensor, _Rounded.apply(x, axis))  # type: ignore[no-untyped-call]


class Int8Linear(nn.Linear):
    """Weights in 8 bits per output, inputs in 8 bits per event.

    Training computes with rounded floats; evaluation multiplies the integers themselves."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            return nn.functional.linear(rounded(x, -1), rounded(self.weight, 1), self.bias)
        rows = x.flatten(0, -2)
        of_rows, of_weight = scale_of(rows, 1), scale_of(self.weight, 1)
        products = torch._int_mm(
            codes(rows, of_rows).to(torch.int8), codes(self.weight, of_weight).to(torch.int8).t()
        )
        out = products.float() * of_rows * of_weight.t() + self.bias
        return out.view(*x.shape[:-1], -1)


class Int8Attention(FullAttention):
    """Full attention in 8 bits: projections and both products; softmax and sums stay in full precision.

    Queries and keys have a step per event. Values have one per channel, over the events of the history:
    channels differ in range by far more than events do, and a step for all of a head would leave narrow
    channels with a few levels. So what is in later slots, padding too, moves a rounding, never more. The
    map's step is 1/127 of its row's largest weight. The two batched products multiply whole numbers held as
    float32, exact while L is below 1,040 (127² L < 2²⁴)."""

    def __init__(self, dim: int, heads: int = 1, dropout: float = 0.0) -> None:
        super().__init__(dim, heads, dropout)
        for name in ("query", "key", "value", "out"):
            plain = getattr(self, name)
            quantized = Int8Linear(dim, dim)
            quantized.load_state_dict(plain.state_dict())
            setattr(self, name, quantized)

    def attended(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        scaled = query * query.shape[-1] ** -0.5
        if self.training or torch.is_grad_enabled():
            logits = torch.matmul(rounded(scaled, -1), rounded(key, -1).transpose(2, 3))
        else:
            of_query, of_key = scale_of(scaled, -1), scale_of(key, -1)
            whole = torch.matmul(codes(scaled, of_query), codes(key, of_key).transpose(2, 3))
            logits = whole * of_query * of_key.transpose(2, 3)
        weights = (logits if bias is None else logits + bias).softmax(-1)
        if self.training or torch.is_grad_enabled():
            found = torch.matmul(self.dropout(rounded(weights, -1)), rounded(value, -2))
        else:
            of_weights, of_value = scale_of(weights, -1), scale_of(value, -2)
            found = torch.matmul(codes(weights, of_weights), codes(value, of_value)) * of_weights * of_value
        return self.out(found.transpose(1, 2).flatten(2)), weights if self.keep_map else None


def parameters(dim: int) -> int:
    """4 (d² + d), of which 4 d² take a byte each."""
    return 4 * (dim * dim + dim)


def flops(dim: int, length: int) -> int:
    """As full attention, 8 L d² + 4 L² d: as many products, each of fewer bits."""
    return 8 * length * dim * dim + 4 * length * length * dim
