"""Structured pruning by what is seen, not by weights alone: whole layers' outputs are kept as near as can be.

What enters the map that heads (or channels) write through is watched on some histories. A head or channel
leaves where its absence, made good by those that stay, changes least of what the map writes (optimal brain
surgeon, Hassibi and Stork 1993, layer by layer); those that stay take over what they can of its part by
least squares, and its mean becomes part of the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from compression.attention.full import FullAttention
from compression.retrieval.network import Layer, RetrievalNetwork
from compression.smaller.structured import keep_channels, keep_heads
from compression.training.model import History

_RIDGE: Final = 1e-3  # of the mean variance, so that inputs that never differ have an inverse
_OWN: Final = 0.3  # of the mean square: rows are looked up as well, and should stay near what they were
_ROWS: Final = 512  # of a table at a time


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Of what enters a linear map: mean [n] and covariance [n, n], in float64."""

    mean: Tensor
    covariance: Tensor


def shrink(network: RetrievalNetwork, histories: Sequence[History], *, heads: int, channels: int) -> None:
    """Leave every layer the heads and channels that are missed most on these histories. Channels are judged
    once the heads are gone."""
    layers = cast(list[Layer], list(network.layers))
    if heads < cast(FullAttention, layers[0].attention).heads:
        outs = [cast(FullAttention, layer.attention).out for layer in layers]
        for layer, seen in zip(layers, moments(network, outs, histories), strict=True):
            attention = cast(FullAttention, layer.attention)
            keep_heads(layer, eliminate(attention.out, seen, kept=heads, groups=attention.heads))
    if channels < layers[0].ffn.narrow.in_features:
        narrow = [layer.ffn.narrow for layer in layers]
        for layer, seen in zip(layers, moments(network, narrow, histories), strict=True):
            ffn = layer.ffn
            keep_channels(ffn, eliminate(ffn.narrow, seen, kept=channels, groups=ffn.narrow.in_features))


@torch.no_grad()
def moments(
    network: RetrievalNetwork, maps: Sequence[nn.Linear], histories: Sequence[History]
) -> list[Moments]:
    """Of what enters each of the network's `maps` at the events of the histories; padding is left out."""
    found: list[list[Tensor]] = [[] for _ in maps]
    with ExitStack() as hooks:
        for linear, rows in zip(maps, found, strict=True):
            hooks.enter_context(linear.register_forward_pre_hook(_append_to(rows)))
        for history in histories:
            network(history)
            there = torch.arange(history.items.shape[1]) < history.lengths[:, None]
            for rows in found:
                rows[-1] = rows[-1][there]
    return [Moments(seen.mean(0), torch.cov(seen.T, correction=0)) for seen in map(_joined, found)]


@torch.no_grad()
def asked(network: RetrievalNetwork, histories: Sequence[History]) -> Tensor:
    """[d, d]: mean square of the user vectors, at every event, that rows of the table are compared with."""
    users = []
    for history in histories:
        there = torch.arange(history.items.shape[1]) < history.lengths[:, None]
        users.append(network(history)[there])
    rows = _joined(users)
    return rows.T @ rows / len(rows)


@torch.no_grad()
def refit(table: Tensor, mask: Tensor, square: Tensor) -> None:
    """Zero what `mask` [rows, d] leaves out, and let what stays of each row take over what it can: products
    with vectors of that mean `square` [d, d], and the row itself, change least."""
    size = len(square)
    square = (square + _OWN * square.diagonal().mean() * torch.eye(size, dtype=square.dtype)).float()
    for rows, kept in zip(table.split(_ROWS), mask.split(_ROWS), strict=True):
        there = kept.to(rows.dtype)
        system = square * there[:, :, None] * there[:, None, :] + torch.diag_embed(1.0 - there)
        rows.copy_(torch.linalg.solve(system, (rows @ square) * there) * there)


@torch.no_grad()
def eliminate(linear: nn.Linear, seen: Moments, *, kept: int, groups: int) -> Tensor:
    """Places (ascending) of the `kept` groups of inputs that stay, of `groups` equal neighbours each. The map
    is changed to do without the others: their columns are zero."""
    if not 1 <= kept <= groups:
        raise ValueError(f"between 1 and {groups} to keep, not {kept}")
    weight, size = linear.weight.double(), linear.in_features
    width = size // groups
    ridge = _RIDGE * seen.covariance.diagonal().mean().clamp(min=1e-12)
    inverse = torch.linalg.inv(seen.covariance + ridge * torch.eye(size, dtype=torch.float64))
    constant = weight @ seen.mean
    stays = torch.ones(groups, dtype=torch.bool)
    for _ in range(groups - kept):
        # What is lost with a group is tr(W_g (inverse_gg)^-1 W_g^T).
        blocks = inverse.view(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        blocks = blocks + torch.eye(width, dtype=torch.float64) * ~stays[:, None, None]
        columns = weight.view(-1, groups, width).permute(1, 2, 0)  # [groups, width, out]
        lost = (columns * torch.linalg.solve(blocks, columns)).sum((1, 2)).masked_fill(~stays, torch.inf)
        least = int(lost.argmin())
        gone = slice(least * width, (least + 1) * width)
        taken = torch.linalg.solve(blocks[least], inverse[gone])
        weight = weight - weight[:, gone] @ taken
        inverse = inverse - inverse[:, gone] @ taken
        stays[least] = False
        # Zero but for rounding: exactly so.
        weight[:, gone] = inverse[gone] = inverse[:, gone] = 0.0
    linear.weight.copy_(weight)
    linear.bias += constant - weight @ seen.mean
    return stays.nonzero().flatten()


def _append_to(rows: list[Tensor]) -> Any:
    def seen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows.append(inputs[0].detach())

    return seen


def _joined(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows).double()
