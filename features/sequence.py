"""The packed behaviour sequence: one binary value per user, newest event last.

Layout, little-endian::

    byte 0      format: 1 = narrow, 2 = wide
    byte 1      number of fences (n)
    then        n fences of 16 bytes: topic epoch u32, partition u32, offset f64
    then        events, fixed width

A narrow event is 12 bytes (item u32; timestamp u32; category and behaviour in one u32: category in
the low 30 bits, behaviour in the high 2); ids beyond that make the value wide (24 bytes: item u64,
category u64, timestamp u32, behaviour u32). A hundred narrow events are 1,218 bytes, which Redis keeps
in one 1,280-byte allocation. The offset is a float64 because Redis scripts count in doubles (exact to 2⁵³).

A fence is the highest offset of one partition that the sequence contains: replaying the log from any
earlier point changes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

MAX_EVENTS: Final = 100
HEADER_BYTES: Final = 2
FENCE_BYTES: Final = 16
NARROW: Final = 1
WIDE: Final = 2
NARROW_EVENT: Final = np.dtype([("item", "<u4"), ("timestamp", "<u4"), ("category_behavior", "<u4")])
WIDE_EVENT: Final = np.dtype(
    [("item", "<u8"), ("category", "<u8"), ("timestamp", "<u4"), ("behavior", "<u4")]
)
WIDTH: Final = {NARROW: NARROW_EVENT.itemsize, WIDE: WIDE_EVENT.itemsize}
MAX_NARROW_ITEM: Final = 2**32 - 1
MAX_NARROW_CATEGORY: Final = 2**30 - 1
MAX_FENCES: Final = 255

_FENCE: Final = struct.Struct("<IId")
_NARROW: Final = struct.Struct("<III")
_WIDE: Final = struct.Struct("<QQII")

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """The behaviour sequences of several users as flat columns, users one after another.

    `lengths` is [users]; the other columns are [sum(lengths)], int64, oldest event of a user first.
    `behaviors` are codes: the position in `topics.messages.BEHAVIORS`.
    """

    lengths: Int64
    items: Int64
    categories: Int64
    behaviors: Int64
    timestamps: Int64

    def __len__(self) -> int:
        return len(self.lengths)

    def of(self, users: Int64) -> SequenceBatch:
        """Some of the users, in ascending order."""
        some = np.zeros(len(self.lengths), np.bool_)
        some[users] = True
        return self._chosen(np.repeat(some, self.lengths), self.lengths[users])

    def newest(self, lengths: Int64) -> SequenceBatch:
        """So many newest events of each user [users], of those there are."""
        first = np.repeat(np.cumsum(self.lengths) - lengths, self.lengths)
        return self._chosen(np.arange(len(first)) >= first, lengths)

    def _chosen(self, events: npt.NDArray[np.bool_], lengths: Int64) -> SequenceBatch:
        at = events.nonzero()[0]
        return SequenceBatch(
            lengths,
            self.items.take(at),
            self.categories.take(at),
            self.behaviors.take(at),
            self.timestamps.take(at),
        )


pack_fence = _FENCE.pack
"""A fence of 16 bytes from topic epoch, partition and offset."""


def pack_event(item_id: int, category_id: int, behavior: int, timestamp: int) -> bytes:
    """One event in the narrow format where it fits, else in the wide one; the length tells which."""
    if item_id <= MAX_NARROW_ITEM and category_id <= MAX_NARROW_CATEGORY:
        return _NARROW.pack(item_id, timestamp, behavior << 30 | category_id)
    return _WIDE.pack(item_id, category_id, timestamp, behavior)


def pack(items: Int64, categories: Int64, behaviors: Int64, timestamps: Int64) -> bytes:
    """A whole sequence without fences, from columns [events], oldest first; no number is negative."""
    if items.max(initial=0) <= MAX_NARROW_ITEM and categories.max(initial=0) <= MAX_NARROW_CATEGORY:
        events = np.empty(len(items), NARROW_EVENT)
        events["category_behavior"] = behaviors << 30 | categories
        header = bytes([NARROW, 0])
    else:
        events = np.empty(len(items), WIDE_EVENT)
        events["category"], events["behavior"] = categories, behaviors
        header = bytes([WIDE, 0])
    events["item"], events["timestamp"] = items, timestamps
    return header + events.tobytes()


def is_sequence(value: bytes) -> bool:
    """Whether these bytes have the layout above."""
    if len(value) < HEADER_BYTES or value[0] not in WIDTH:
        return False
    length = len(value) - HEADER_BYTES - FENCE_BYTES * value[1]
    return length >= 0 and length % WIDTH[value[0]] == 0


def newest_events(value: bytes, events: int) -> bytes:
    """The format and so many newest events of a packed value that has them: what `unpack` reads, and nothing
    else.

    Two values with equal ones are the same history, and one that is a prefix of another has grown into
    it. Empty where there are no events.
    """
    return value[:1] + value[-events * WIDTH[value[0]] :] if events else b""


def unpack(values: Sequence[bytes | None], *, last: int = MAX_EVENTS) -> SequenceBatch:
    """Packed values as columns, at most the `last` newest events of each; None is an empty sequence,
    and so is a value that is not a packed sequence.

    One `numpy.frombuffer` for the whole batch where all values are narrow, as they nearly always are.
    """
    bodies: list[bytes] = []
    wide_at: list[int] = []
    for position, value in enumerate(values):
        if not value or not is_sequence(value):
            bodies.append(b"")
            continue
        start = HEADER_BYTES + FENCE_BYTES * value[1]
        width = WIDTH[value[0]]
        start = max(start, len(value) - last * width)
        bodies.append(value[start:])
        if value[0] == WIDE:
            wide_at.append(position)
    if not wide_at:
        lengths = np.fromiter(map(len, bodies), np.int64, len(bodies)) // NARROW_EVENT.itemsize
        return _columns(np.frombuffer(b"".join(bodies), NARROW_EVENT), lengths)
    wide = set(wide_at)
    parts = [
        _columns(np.frombuffer(body, dtype), np.array([len(body) // dtype.itemsize]))
        for body, dtype in (
            (body, WIDE_EVENT if position in wide else NARROW_EVENT) for position, body in enumerate(bodies)
        )
    ]
    return SequenceBatch(
        lengths=np.concatenate([part.lengths for part in parts]),
        items=np.concatenate([part.items for part in parts]),
        categories=np.concatenate([part.categories for part in parts]),
        behaviors=np.concatenate([part.behaviors for part in parts]),
        timestamps=np.concatenate([part.timestamps for part in parts]),
    )


def _columns(events: npt.NDArray[Any], lengths: Int64) -> SequenceBatch:
    if events.dtype == NARROW_EVENT:
        packed = events["category_behavior"].astype(np.int64)
        categories, behaviors = packed & MAX_NARROW_CATEGORY, packed >> 30
    else:
        categories, behaviors = events["category"].astype(np.int64), events["behavior"].astype(np.int64)
    return SequenceBatch(
        lengths=lengths,
        items=events["item"].astype(np.int64),
        categories=categories,
        behaviors=behaviors,
        timestamps=events["timestamp"].astype(np.int64),
    )
