"""Candidates, and the rows they are made of: a line per user, an item and a whole number in each column.

A score is a whole number with the source in its lowest bits, so sums do not depend on the order of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from topics.messages import Source

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Number = TypeVar("Number", bound=np.number[Any])

SOURCES: Final[tuple[Source, ...]] = get_args(Source)
"""Names of source codes."""
RETRIEVAL, TRANSITION, RECENT, CATEGORY, POPULAR, REQUEST = range(6)
WEIGHT: Final = np.array([4.0, 12.0, 4.0, 0.5, 0.1], np.float32)
"""Of the sources that find candidates, by code."""

SOURCE_BITS: Final = 3
LAST_SOURCE: Final = (1 << SOURCE_BITS) - 1
ONE: Final = np.float32(1 << 20)
NO_ITEM: Final = -1


@dataclass(frozen=True, slots=True)
class Candidates:
    """Per user at most `limit` items, best screening score first; rows are padded at the end.

    items int64 [users, width] (padding 0), sources uint8 [users, width] (`SOURCES`), counts int64
    [users]. The width is that of the longest row. evidence float32 [users, width] is what the fusion
    adds to scores (padding 0); None where nothing is added.
    """

    items: Int64
    sources: npt.NDArray[np.uint8]
    counts: Int64
    evidence: Float32 | None = None


class Rows:
    """Columns in the making, a line per user: items, and scores with their source in the lowest bits.
    Where a line has fewer rows than others it is padded, with no item and a negative score."""

    def __init__(self, users: int) -> None:
        self.users = users
        self.items: list[Int64] = []
        self.scores: list[Int64] = []

    def add(self, items: Int64, scores: Int64) -> None:
        """[users, rows] of both."""
        self.items.append(items)
        self.scores.append(scores)

    def add_to_all(self, items: Int64, scores: Int64) -> None:
        """The same rows to every line."""
        self.add(items[None].repeat(self.users, axis=0), scores[None].repeat(self.users, axis=0))

    def add_ragged(self, counts: Sequence[int], items: Int64, scores: Int64) -> None:
        """So many rows to each line, in order."""
        width = max(counts)
        if width * self.users == len(items):
            self.add(items.reshape(self.users, width), scores.reshape(self.users, width))
            return
        filled = np.arange(width) < np.array(counts)[:, None]
        self.add(in_lines(filled, items, NO_ITEM), in_lines(filled, scores, -1))

    def add_named(self, users: Sequence[int], given: Candidates) -> tuple[int, int]:
        """Rows that add nothing, for what some users named to be found again: where their columns start
        and end."""
        items = np.full((self.users, given.items.shape[1]), NO_ITEM)
        there = np.arange(items.shape[1]) < given.counts[:, None]
        items[list(users)] = np.where(there, given.items, NO_ITEM)
        start = sum(column.shape[1] for column in self.items)
        self.add(items, np.where(items == NO_ITEM, -1, 0))
        return start, start + items.shape[1]


def in_lines(filled: Bool, values: npt.NDArray[Number], padding: int) -> npt.NDArray[Number]:
    """Values in order, a line as many as are to be filled of it."""
    matrix = np.full(filled.shape, padding, values.dtype)
    matrix[filled] = values
    return matrix


def scored(scores: Float32, source: int) -> Int64:
    """Whole numbers. Of equal scores the earlier source is the greater one."""
    whole = (scores * ONE).astype(np.int64)
    whole <<= SOURCE_BITS
    whole += LAST_SOURCE - source
    return whole
