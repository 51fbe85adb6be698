"""Behaviour sequences as the arrays the network reads. Training and serving both go through here.

Rows of the item and category tables: 0 is padding, then the known ids in ascending order, then hash
buckets for ids the vocabulary has not seen. A hash bucket is a function of the id alone, so every
process gives an unknown id the same row. The first category bucket is kept for "category unknown".
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from features.npy import read_npz
from features.sequence import SequenceBatch

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

CANDIDATE_BEHAVIOR: Final = 5
BEHAVIOR_ROWS: Final = 6  # padding, pv, cart, fav, buy, candidate
GAP_ROWS: Final = 32


class Rows(Protocol):
    """Which table row an id has: the vocabulary, or what answers as it does and faster."""

    def item_rows_of(self, ids: Int64, /) -> Int32: ...
    def category_rows_of(self, ids: Int64, /) -> Int32: ...


class VocabularyInvalid(ValueError):
    """The bytes are not a vocabulary this code can use; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """Which table row an id has. `item_ids` and `category_ids` ascend without repeats;
    `item_categories` holds the category row of each known item, in the same order."""

    item_ids: Int64
    item_categories: Int32
    category_ids: Int64
    item_buckets: int
    category_buckets: int

    def __post_init__(self) -> None:
        if self.item_buckets < 1 or self.category_buckets < 2:
            raise VocabularyInvalid("at least one item bucket and two category buckets are needed")
        if self.item_ids.ndim != 1 or self.item_categories.shape != self.item_ids.shape:
            raise VocabularyInvalid("item ids and item categories differ in shape")
        for ids in (self.item_ids, self.category_ids):
            if ids.ndim != 1 or np.any(ids[1:] <= ids[:-1]):
                raise VocabularyInvalid("ids must ascend without repeats")
        rows = self.item_categories
        if len(rows) and (rows.min() < 1 or rows.max() >= self.category_rows):
            raise VocabularyInvalid("an item names a category row that does not exist")

    @property
    def item_rows(self) -> int:
        """Rows of the item table: padding, known items, buckets."""
        return 1 + len(self.item_ids) + self.item_buckets

    @property
    def category_rows(self) -> int:
        """Rows of the category table: padding, known categories, buckets."""
        return 1 + len(self.category_ids) + self.category_buckets

    @property
    def unknown_category_row(self) -> int:
        return 1 + len(self.category_ids)

    def item_rows_of(self, ids: Int64) -> Int32:
        """The row of each item; an unknown id has the row of its hash bucket."""
        place, known = _find(self.item_ids, ids)
        if known.all():
            return (place + 1).astype(np.int32)
        return np.where(known, place + 1, self.bucket_rows_of(ids)).astype(np.int32)

    def bucket_rows_of(self, ids: Int64) -> Int32:
        """The hash bucket each item would have if it were unknown."""
        return (1 + len(self.item_ids) + _mix(ids) % self.item_buckets).astype(np.int32)

    def category_rows_of(self, ids: Int64) -> Int32:
        """The row of each category; an unknown id has the row of its hash bucket."""
        place, known = _find(self.category_ids, ids)
        if known.all():
            return (place + 1).astype(np.int32)
        bucket = self.unknown_category_row + 1 + _mix(ids) % (self.category_buckets - 1)
        return np.where(known, place + 1, bucket).astype(np.int32)

    def category_rows_of_items(self, item_ids: Int64) -> Int32:
        """The category row of each item; the "category unknown" row where the item is unknown."""
        place, known = _find(self.item_ids, item_ids)
        if not len(self.item_ids):
            return np.full(np.shape(item_ids), self.unknown_category_row, np.int32)
        return np.where(known, self.item_categories[place], self.unknown_category_row).astype(np.int32)

    def is_known(self, ids: Int64) -> npt.NDArray[np.bool_]:
        """Whether each item has a row of its own."""
        return _find(self.item_ids, ids)[1]

    def items_at(self, rows: npt.NDArray[np.integer[Any]]) -> Int64:
        """The item ids at rows of known items (1 to n)."""
        places = np.asarray(rows, np.int64) - 1
        if places.size and (places.min() < 0 or places.max() >= len(self.item_ids)):
            raise IndexError("a row of padding or of a hash bucket names no item")
        return self.item_ids[places]

    def save(self, path: Path) -> None:
        """Write as an .npz without pickle."""
        with path.open("wb") as file:
            np.savez(
                file,
                item_ids=self.item_ids,
                item_categories=self.item_categories,
                category_ids=self.category_ids,
                buckets=np.array([self.item_buckets, self.category_buckets], np.int64),
            )

    @classmethod
    def load(cls, source: bytes | Path) -> Vocabulary:
        """Read what `save` wrote, from a file or from its bytes."""
        data = source if isinstance(source, bytes) else source.read_bytes()
        try:
            arrays = read_npz(data, ("item_ids", "item_categories", "category_ids", "buckets"))
            item_buckets, category_buckets = (int(count) for count in arrays["buckets"])
            return cls(
                item_ids=arrays["item_ids"].astype(np.int64, casting="safe"),
                item_categories=arrays["item_categories"].astype(np.int32, casting="safe"),
                category_ids=arrays["category_ids"].astype(np.int64, casting="safe"),
                item_buckets=item_buckets,
                category_buckets=category_buckets,
            )
        except VocabularyInvalid:
            raise
        except (KeyError, ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise VocabularyInvalid(f"not a vocabulary: {error}") from None


@dataclass(frozen=True, slots=True, eq=False)
class HistoryArrays:
    """Histories as the graphs read them: int32 [users, slots], right padded with 0; lengths [users]."""

    items: Int32
    categories: Int32
    behaviors: Int32
    gaps: Int32
    lengths: Int32

    def __len__(self) -> int:
        return len(self.lengths)

    def tensors(self) -> dict[str, Int32]:
        """By the names of the graphs' inputs."""
        return {
            "items": self.items,
            "categories": self.categories,
            "behaviors": self.behaviors,
            "gaps": self.gaps,
            "lengths": self.lengths,
        }


def encode_histories(batch: SequenceBatch, vocabulary: Rows, length: int) -> HistoryArrays:
    """The newest `length` events of each user, in `length` slots. No loop over users."""
    kept = np.minimum(batch.lengths, length)
    slots = np.arange(length)
    valid = slots < kept[:, None]
    at = (np.cumsum(batch.lengths) - kept)[:, None] + slots
    at = at[valid]

    def padded(column: npt.NDArray[np.integer[Any]]) -> Int32:
        array = np.zeros(valid.shape, np.int32)
        array[valid] = column
        return array

    gaps = padded(gap_buckets(np.diff(batch.timestamps, prepend=batch.timestamps[:1])[at]))
    gaps[:, :1] = 0
    return HistoryArrays(
        items=padded(vocabulary.item_rows_of(batch.items[at])),
        categories=padded(vocabulary.category_rows_of(batch.categories[at])),
        behaviors=padded(batch.behaviors[at] + 1),
        gaps=gaps,
        lengths=kept.astype(np.int32),
    )


def encode_events(batch: SequenceBatch, at: Int64, vocabulary: Rows) -> dict[str, Int32]:
    """Some events by their place in the columns, none of them a user's first: the rows that
    `encode_histories` gives them, each [events]."""
    return {
        "items": vocabulary.item_rows_of(batch.items[at]),
        "categories": vocabulary.category_rows_of(batch.categories[at]),
        "behaviors": (batch.behaviors[at] + 1).astype(np.int32),
        "gaps": gap_buckets(batch.timestamps[at] - batch.timestamps[at - 1]),
    }


def gap_buckets(gaps_s: Int64) -> Int32:
    """1 + floor(log2(1 + gap)), at most 31. A clock that ran backwards counts as no gap."""
    exponent = np.frexp(1.0 + np.maximum(gaps_s, 0))[1] - 1
    return np.asarray(np.minimum(1 + exponent, GAP_ROWS - 1), np.int32)


def _find(ascending: Int64, ids: Int64) -> tuple[Int64, npt.NDArray[np.bool_]]:
    if not len(ascending):
        return np.zeros(np.shape(ids), np.int64), np.zeros(np.shape(ids), np.bool_)
    place = np.minimum(np.searchsorted(ascending, ids), len(ascending) - 1)
    return place, ascending[place] == ids


def _mix(ids: Int64) -> Int64:
    """splitmix64's finaliser, top bit dropped: the same number in every process, for ever."""
    x = np.asarray(ids).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)
