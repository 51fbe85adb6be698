"""Dynamic-range quantization (formulas 8 and 9) and training with it.

A step is found from the range of the weights that are not zero, per tensor or per row. Values are whole
numbers of steps, so zero stays zero and what was pruned stays pruned. While training, weights are
rounded on the way forward, and gradients reach the full-precision weights as if nothing had been
rounded (straight through).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

MIN_BITS: Final = 2
MAX_BITS: Final = 8


@dataclass(frozen=True, slots=True)
class Grid:
    """How finely, whether a row (the first axis) has a step of its own, and whether the range reaches as
    far below zero as above: then there are 2^bits - 1 codes, and those of 8 bits fit a signed byte."""

    bits: int = 8
    per_row: bool = False
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"between {MIN_BITS} and {MAX_BITS} bits, not {self.bits}")


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """codes int16 of the weights' shape: weight = code * step. step, low and high are float32, int16 and
    int16 of shape [] or [rows, 1, …]; there are at most 2^bits codes from low to high."""

    codes: Tensor
    step: Tensor
    low: Tensor
    high: Tensor

    def values(self) -> Tensor:
        return self.codes.float() * self.step


def step_size(weights: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """s = (max W - min W) / (2^b - 1) over the non-zero weights (formula 8), with that min and max; one of
    each per row or for the whole tensor.

    Where all non-zero weights are the same number there is no range, and the step is that number."""
    nothing = weights == 0
    axes = tuple(range(1, weights.ndim)) if grid.per_row else tuple(range(weights.ndim))
    low = weights.masked_fill(nothing, torch.inf).amin(axes, keepdim=grid.per_row)
    high = weights.masked_fill(nothing, -torch.inf).amax(axes, keepdim=grid.per_row)
    empty = low > high
    low, high = low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)
    if grid.symmetric:
        high = torch.maximum(high.abs(), low.abs())
        low = -high
    step = (high - low) / (2**grid.bits - 1 - int(grid.symmetric))
    step = torch.where(step > 0, step, high.abs())
    return torch.where(step > 0, step, torch.ones_like(step)), low, high


def quantize(weights: Tensor, grid: Grid) -> Quantized:
    """Codes of round(w / s), clipped to the range of the non-zero weights (formula 9).

    The clip is to that range moved by at most half a step, so that its ends are codes: formula 9's own would
    leave them between steps, where no code is. All codes are used, and what was rounded once stays as it
    is when it is rounded again, as it is where it is stored."""
    weights = weights.detach().float()
    step, low, high = step_size(weights, grid)
    first = torch.round(low / step)
    last = first + torch.round((high - low) / step)
    codes = torch.minimum(torch.maximum(torch.round(weights / step), first), last)
    # Both ends fall between two codes where one does, and may be rounded towards each other.
    codes = torch.where(weights >= high, last, torch.where(weights <= low, first, codes))
    codes = codes.masked_fill(weights == 0, 0.0)
    return Quantized(codes.to(torch.int16), step, first.to(torch.int16), last.to(torch.int16))


class _Rounded(torch.autograd.Function):
    """Rounded forward, untouched backward."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, grid: Grid) -> Tensor:
        return quantize(weights, grid).values()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def fake_quantize(weights: Tensor, grid: Grid) -> Tensor:
    """The values that weights will have, with full-precision gradients."""
    return cast(Tensor, _Rounded.apply(weights, grid))  # type: ignore[no-untyped-call]


class _FakeQuantized(nn.Module):
    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, weights: Tensor) -> Tensor:
        return fake_quantize(weights, self.grid)


@contextmanager
def aware(model: nn.Module, chosen: Mapping[str, Grid]) -> Iterator[nn.Module]:
    """Train inside this: modules by name see their weights rounded. Afterwards the weights are the rounded
    ones.

    Of an embedding only the rows that are looked up are rounded, as they come out: a row's step depends on
    nothing else. Its grid must be per row."""
    modules = dict(model.named_modules())
    hooks, linear = [], []
    for name, grid in chosen.items():
        module = modules[name]
        if isinstance(module, nn.Embedding):
            if not grid.per_row:
                raise ValueError(f"{name} is a table: its steps are per row")
            hooks.append(module.register_forward_hook(_round_rows(grid)))
        else:
            parametrize.register_parametrization(module, "weight", _FakeQuantized(grid))
            linear.append(module)
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
        for module in linear:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        for name, grid in chosen.items():
            module = modules[name]
            if isinstance(module, nn.Embedding):
                with torch.no_grad():
                    module.weight.copy_(quantize(module.weight, grid).values())


def _round_rows(grid: Grid) -> Any:
    def rounded(module: nn.Module, inputs: Any, rows: Tensor) -> Tensor:
        return fake_quantize(rows.flatten(0, -2), grid).view_as(rows)

    return rounded
