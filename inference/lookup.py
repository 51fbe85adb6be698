"""Rows of items and categories by id, on the hot path.

The vocabulary finds an id by bisection, a few hundred nanoseconds each once the catalogue outgrows the
cache; a batch asks for ten thousand. Ids that are dense enough get a table with a place for every id.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from features.encoding import Vocabulary
from inference import memory

_MAX_TABLE: Final = 2**25  # places of 4 bytes: 128 MiB at the most
_MAX_SPREAD: Final = 256  # places per id,
_ALWAYS: Final = 2**23  # or so many, however few ids there are

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


class ItemLookup:
    """The same answers as the vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        ids = vocabulary.item_ids
        buckets = np.full(vocabulary.item_buckets, vocabulary.unknown_category_row, np.int32)
        self._categories = np.concatenate([np.zeros(1, np.int32), vocabulary.item_categories, buckets])
        # Unlike `_categories`: -1 where there is none to count against a cap.
        self._capped = np.where(self._categories == vocabulary.unknown_category_row, -1, self._categories)
        self._capped[0] = -1
        self._table = _table(ids)
        self._category_table = _table(vocabulary.category_ids)

    def rows(self, items: Int64) -> Int32:
        """The row of each item; its hash bucket's where it is unknown."""
        if self._table is None:
            return self._vocabulary.item_rows_of(items)
        rows = self._table.take(items, mode="clip")
        if rows.all():
            return rows
        unknown = rows == 0
        rows[unknown] = self._vocabulary.bucket_rows_of(items[unknown])
        return rows

    item_rows_of = rows

    def category_rows_of(self, categories: Int64) -> Int32:
        """The row of each category; its hash bucket's where it is unknown."""
        if self._category_table is None:
            return self._vocabulary.category_rows_of(categories)
        rows = self._category_table.take(categories, mode="clip")
        if not rows.all():
            unknown = rows == 0
            rows[unknown] = self._vocabulary.category_rows_of(categories[unknown])
        return rows

    def categories_of_rows(self, rows: Int32) -> Int32:
        """The category row that goes with each item row."""
        return self._categories.take(rows)

    def capped_categories(self, items: Int64) -> Int32:
        """The category row of each item, -1 where it is not known."""
        if self._table is None:
            return self._capped.take(self.rows(items))
        return self._capped.take(self._table.take(items, mode="clip"))


def _table(ids: Int64) -> Int32 | None:
    """The row of every id up to the largest, 0 where it has none; None where ids are too far apart."""
    if not len(ids) or ids[0] < 0 or ids[-1] >= min(_MAX_TABLE, max(_ALWAYS, _MAX_SPREAD * len(ids))):
        return None
    # The last place is 0 and stands for every id beyond.
    table = memory.zeros((int(ids[-1]) + 2,), np.int32)
    table[ids] = np.arange(1, len(ids) + 1, dtype=np.int32)
    return table
