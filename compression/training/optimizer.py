"""From the gradients of a step to weights: summed over the processes, clipped, applied.

A small item table learns with the rest, by AdamW. Of a large one (`Recipe.sparse_items`) a step touches few
rows, so its gradient is rows (a sparse tensor) from the backward pass on, and SparseAdam moves these rows
only: a step then costs what its batch is large, not what the catalogue is. Either way processes send the
touched rows of the table's gradient, not the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compression.training.group import Group
from compression.training.model import Recommender

if TYPE_CHECKING:
    from compression.training.train import Recipe

MAX_NORM: Final = 1.0

Int64 = npt.NDArray[np.int64]


class Optimizer:
    """Both optimizers of a model, and the sum over processes that comes before them. `by_rows`: the item
    table's gradient is sparse."""

    def __init__(self, model: Recommender, recipe: Recipe, group: Group, *, by_rows: bool) -> None:
        self._model, self._group = model, group
        self._table = model.items.weight
        self._by_rows = model.items.sparse = by_rows
        kinds = _parameter_groups(model, recipe, left_out=self._table if by_rows else None)
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(kinds, lr=recipe.learning_rate, fused=True)
        ]
        if by_rows:
            self.parts.append(torch.optim.SparseAdam([self._table], lr=recipe.learning_rate))

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self, touched: Int64 | None, numbers: Sequence[Tensor | float]) -> list[float]:
        """Apply the gradients, and return the `numbers` summed over the processes. `touched`: rows of the
        item table that have a gradient in any process, ascending; None: all of them."""
        told = self._summed(touched, numbers) if self._group.size > 1 else [float(one) for one in numbers]
        clip(list(self._model.parameters()), self._table if self._by_rows else None)
        for part in self.parts:
            part.step()
        return told

    def _summed(self, touched: Int64 | None, numbers: Sequence[Tensor | float]) -> list[float]:
        """Every gradient and the numbers in one message."""
        dense = [p.grad for p in self._model.parameters() if p.grad is not None and p is not self._table]
        table = self._table.grad
        assert table is not None
        rows = None if touched is None else torch.from_numpy(touched).to(table.device)
        said = torch.tensor([float(one) for one in numbers], dtype=torch.float32, device=table.device)
        packed = [self._rows_of(table, rows), *dense, said]
        message = self._group.sum(torch.cat([part.reshape(-1) for part in packed]))
        summed = torch.split(message, [part.numel() for part in packed])
        for grad, total in zip(dense, summed[1:-1], strict=True):
            grad.copy_(total.view_as(grad))
        of_table = summed[0].view(-1, table.shape[1])
        if self._by_rows:
            assert rows is not None
            self._table.grad = torch.sparse_coo_tensor(
                rows[None], of_table, table.shape, is_coalesced=True, check_invariants=False
            )
        elif rows is None:
            table.copy_(of_table)
        else:
            table[rows] = of_table
        return [float(one) for one in summed[-1]]

    def _rows_of(self, table: Tensor, rows: Tensor | None) -> Tensor:
        """[rows, D] of the table's gradient; a row that this process has not touched is 0."""
        if not self._by_rows:
            return table if rows is None else table[rows]
        assert rows is not None
        ours = table.coalesce()
        found = torch.zeros(len(rows), table.shape[1], dtype=table.dtype, device=table.device)
        return found.index_copy_(0, torch.searchsorted(rows, ours.indices()[0]), ours.values())


def clip(parameters: Sequence[torch.nn.Parameter], by_rows: Tensor | None) -> None:
    """All gradients made smaller alike where their norm is above `MAX_NORM`; that of `by_rows` is sparse."""
    if by_rows is None:
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        return
    assert by_rows.grad is not None
    by_rows.grad = by_rows.grad.coalesce()
    rest = [p for p in parameters if p is not by_rows]
    dense = [p.grad for p in rest if p.grad is not None]
    values = by_rows.grad.values()
    norm = math.hypot(float(torch.nn.utils.get_total_norm(dense)), float(values.norm()))
    torch.nn.utils.clip_grads_with_norm_(rest, MAX_NORM, torch.tensor(norm))
    values.mul_(min(1.0, MAX_NORM / (norm + 1e-6)))


def _parameter_groups(model: Recommender, recipe: Recipe, left_out: Tensor | None) -> list[dict[str, object]]:
    matrices = [p for n, p in model.named_parameters() if n.startswith(("blocks", "readout")) and p.ndim == 2]
    chosen = {id(p) for p in matrices} | {id(left_out)}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
