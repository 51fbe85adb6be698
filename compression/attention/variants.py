"""Every way to attend by name, with its formulas for parameters and work beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from compression.attention import depthwise, grouped, int8, low_rank, sparse
from compression.attention.base import Attention
from compression.attention.full import FullAttention


class Sizes(Protocol):
    """What a network's configuration tells its attention."""

    @property
    def dim(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def dropout(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Variant:
    """`build` makes one layer's attention. `parameters` and `flops` say what one layer has and, for one
    history of some length, does; a multiplication and an addition are two. A softmax counts for nothing."""

    name: str
    build: Callable[[Sizes], Attention]
    parameters: Callable[[Sizes], int]
    flops: Callable[[Sizes, int], int]


def full() -> Variant:
    return Variant(
        "full",
        lambda sizes: FullAttention(sizes.dim, sizes.heads, sizes.dropout),
        lambda sizes: 4 * (sizes.dim**2 + sizes.dim),
        lambda sizes, length: 8 * length * sizes.dim**2 + 4 * length**2 * sizes.dim,
    )


def grouped_projections(groups: int = 4) -> Variant:
    return Variant(
        f"grouped, k = {groups}",
        lambda sizes: grouped.GroupedAttention(sizes.dim, sizes.heads, sizes.dropout, groups=groups),
        lambda sizes: grouped.parameters(sizes.dim, groups),
        lambda sizes, length: grouped.flops(sizes.dim, groups, length),
    )


def depthwise_separable(kernel: int = 3) -> Variant:
    return Variant(
        f"depthwise-separable, c = {kernel}",
        lambda sizes: depthwise.DepthwiseAttention(sizes.dim, sizes.heads, sizes.dropout, kernel=kernel),
        lambda sizes: depthwise.parameters(sizes.dim, kernel),
        lambda sizes, length: depthwise.flops(sizes.dim, kernel, length),
    )


def low_rank_heads(rank: int = 8) -> Variant:
    return Variant(
        f"low-rank, r = {rank}",
        lambda sizes: low_rank.LowRankAttention(sizes.dim, sizes.heads, sizes.dropout, rank=rank),
        lambda sizes: low_rank.parameters(sizes.dim, sizes.heads, rank),
        lambda sizes, length: low_rank.flops(sizes.dim, sizes.heads, rank, length),
    )


def hybrid_sparse(window: int = 16, sampling: sparse.Sampling = "fixed", seed: int = 0) -> Variant:
    return Variant(
        f"sparse {sampling}, w = {window}",
        lambda sizes: sparse.SparseAttention(
            sizes.dim, sizes.heads, sizes.dropout, window=window, sampling=sampling, seed=seed
        ),
        lambda sizes: sparse.parameters(sizes.dim),
        lambda sizes, length: sparse.flops(sizes.dim, window, length),
    )


def eight_bits() -> Variant:
    return Variant(
        "int8",
        lambda sizes: int8.Int8Attention(sizes.dim, sizes.heads, sizes.dropout),
        lambda sizes: int8.parameters(sizes.dim),
        lambda sizes, length: int8.flops(sizes.dim, length),
    )


def all_variants() -> list[Variant]:
    """One of each, with settings that suit 32 to 160 dimensions in 2 to 4 heads."""
    return [
        full(),
        grouped_projections(4),
        depthwise_separable(3),
        low_rank_heads(4),
        hybrid_sparse(16, "fixed"),
        hybrid_sparse(16, "random"),
        eight_bits(),
    ]
