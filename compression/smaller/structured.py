"""Structured pruning: heads and feed-forward channels really leave, what stays is dense and smaller.

Also two other ways to a smaller dense network: linear maps as products of two (low rank), and layers that
share their weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from compression.attention.full import FullAttention
from compression.retrieval.network import FeedForward, Layer, RetrievalNetwork


def head_importance(attention: FullAttention) -> Tensor:
    """[heads]: how much a head can write: the norm of value map times output map, head by head."""
    value = attention.value.weight.view(attention.heads, -1, attention.value.in_features)  # [H, w, d]
    out = attention.out.weight.view(attention.out.out_features, attention.heads, -1).transpose(
        0, 1
    )  # [H, d, w]
    importance: Tensor = torch.linalg.matrix_norm(torch.bmm(out, value))
    return importance


def channel_importance(ffn: FeedForward) -> Tensor:
    """[ffn]: norm of what enters a channel times norm of what it writes."""
    if ffn.activation == "swiglu":
        raise ValueError("channels of a gated feed-forward part come in pairs, which this does not know")
    reads: Tensor = torch.linalg.vector_norm(ffn.widen.weight, dim=1)
    writes: Tensor = torch.linalg.vector_norm(ffn.narrow.weight, dim=0)
    return reads * writes


@torch.no_grad()
def keep_heads(layer: Layer, heads: Tensor) -> None:
    """Remove all heads but these (places, ascending) from a layer's full attention and its reach."""
    attention = cast(FullAttention, layer.attention)
    width = attention.query.out_features // attention.heads
    rows = (heads[:, None] * width + torch.arange(width)).flatten()
    for name in ("query", "key", "value"):
        setattr(attention, name, _rows(getattr(attention, name), rows))
    attention.out = _columns(attention.out, rows)
    attention.heads = len(heads)
    if layer.reach is not None:
        layer.reach = nn.Parameter(layer.reach[heads].clone())


@torch.no_grad()
def keep_channels(ffn: FeedForward, channels: Tensor) -> None:
    """Remove all channels but these (places, ascending) from a feed-forward part."""
    ffn.widen = _rows(ffn.widen, channels)
    ffn.narrow = _columns(ffn.narrow, channels)


def shrink(network: RetrievalNetwork, *, heads: int, channels: int) -> None:
    """Leave every layer its most important heads and channels."""
    for layer in cast(list[Layer], list(network.layers)):
        attention = cast(FullAttention, layer.attention)
        if heads < attention.heads:
            keep_heads(layer, _best(head_importance(attention), heads))
        if channels < layer.ffn.widen.out_features:
            keep_channels(layer.ffn, _best(channel_importance(layer.ffn), channels))


def fit_to(network: RetrievalNetwork, weights: Mapping[str, Tensor]) -> None:
    """Give a network of full size the smaller shapes that the weights to be loaded have."""
    for number, layer in enumerate(cast(list[Layer], list(network.layers))):
        attention = cast(FullAttention, layer.attention)
        width = attention.query.out_features // attention.heads
        heads = weights[f"layers.{number}.attention.query.weight"].shape[0] // width
        keep_heads(layer, torch.arange(heads))
        keep_channels(layer.ffn, torch.arange(weights[f"layers.{number}.ffn.widen.weight"].shape[0]))


@torch.no_grad()
def factorised(linear: nn.Linear, rank: int) -> nn.Sequential:
    """The two maps, d to r and r to d, whose product is nearest to a linear map's matrix (truncated SVD);
    cheaper where r < d_in d_out / (d_in + d_out)."""
    if not 1 <= rank <= min(linear.weight.shape):
        raise ValueError(f"a rank between 1 and {min(linear.weight.shape)}, not {rank}")
    left, sizes, right = torch.linalg.svd(linear.weight, full_matrices=False)
    root = sizes[:rank].sqrt()
    down = nn.Linear(linear.in_features, rank, bias=False)
    up = nn.Linear(rank, linear.out_features, bias=linear.bias is not None)
    down.weight.copy_(root[:, None] * right[:rank])
    up.weight.copy_(left[:, :rank] * root)
    if linear.bias is not None:
        up.bias.copy_(linear.bias)
    return nn.Sequential(down, up)


def share_layers(network: RetrievalNetwork, kept: int) -> None:
    """Let layers share weights: `kept` distinct ones, each used by as many neighbours as the others or one
    more. Work stays the same; parameters and their gradients are counted once."""
    layers = list(network.layers)
    if not 1 <= kept <= len(layers):
        raise ValueError(f"between 1 and {len(layers)} distinct layers, not {kept}")
    network.layers = nn.ModuleList(layers[number * kept // len(layers)] for number in range(len(layers)))


def _best(importance: Tensor, count: int) -> Tensor:
    if not 1 <= count <= len(importance):
        raise ValueError(f"between 1 and {len(importance)} to keep, not {count}")
    return importance.topk(count).indices.sort().values


def _rows(linear: nn.Linear, rows: Tensor) -> nn.Linear:
    """A linear map with some of its outputs."""
    smaller = nn.Linear(linear.in_features, len(rows))
    smaller.weight.copy_(linear.weight[rows])
    smaller.bias.copy_(linear.bias[rows])
    return smaller


def _columns(linear: nn.Linear, columns: Tensor) -> nn.Linear:
    """A linear map with some of its inputs."""
    smaller = nn.Linear(len(columns), linear.out_features)
    smaller.weight.copy_(linear.weight[:, columns])
    smaller.bias.copy_(linear.bias)
    return smaller
