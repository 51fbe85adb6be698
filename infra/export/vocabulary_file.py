"""A vocabulary as typed arrays behind one another, which a browser reads without parsing.

Little-endian, each array from a multiple of 8 bytes on; the manifest says type, offset and length. Ids are
uint32 where all of them fit and int64 else, category rows uint16 or uint32.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from features.encoding import Vocabulary

FILE: Final = "vocabulary.bin"
_ALIGNED: Final = 8

ArrayType = Literal["uint16", "uint32", "int64"]
Int64 = npt.NDArray[np.int64]


class ArrayEntry(BaseModel):
    """Where an array lies in the file; `length` counts numbers, `offset` bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: ArrayType
    offset: Annotated[int, Field(ge=0)]
    length: Annotated[int, Field(ge=0)]


class VocabularyEntry(BaseModel):
    """What a client needs beside the bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = FILE
    item_buckets: Annotated[int, Field(ge=1)]
    category_buckets: Annotated[int, Field(ge=2)]
    arrays: dict[Literal["item_ids", "item_categories", "category_ids"], ArrayEntry]


def with_items(vocabulary: Vocabulary, places: Int64) -> Vocabulary:
    """The same vocabulary with some of its items only, by their ascending places; the others are unknown."""
    return Vocabulary(
        item_ids=vocabulary.item_ids[places],
        item_categories=vocabulary.item_categories[places],
        category_ids=vocabulary.category_ids,
        item_buckets=vocabulary.item_buckets,
        category_buckets=vocabulary.category_buckets,
    )


def write(vocabulary: Vocabulary) -> tuple[bytes, VocabularyEntry]:
    """The file's bytes, and their description."""
    content = bytearray()
    arrays: dict[Any, ArrayEntry] = {}
    for name in ("item_ids", "item_categories", "category_ids"):
        column = getattr(vocabulary, name)
        kind = _narrowest(column, ids=name != "item_categories")
        content += bytes(-len(content) % _ALIGNED)
        arrays[name] = ArrayEntry(type=kind, offset=len(content), length=len(column))
        content += column.astype(np.dtype(kind).newbyteorder("<")).tobytes()
    entry = VocabularyEntry(
        item_buckets=vocabulary.item_buckets, category_buckets=vocabulary.category_buckets, arrays=arrays
    )
    return bytes(content), entry


def _narrowest(column: npt.NDArray[np.integer[Any]], *, ids: bool) -> ArrayType:
    smallest, largest = int(column.min(initial=0)), int(column.max(initial=0))
    if smallest < 0 or largest > np.iinfo(np.uint32).max:
        return "int64"
    return "uint32" if ids or largest > np.iinfo(np.uint16).max else "uint16"
