"""Encoded histories of active users, so that the same question is not computed twice.

A history whose events are all known costs no encoding, one that has grown by a few events costs those
events alone (`append` in `compression.export`). What is kept is compared byte for byte with what is
asked, so an answer never rests on a history that was trimmed, corrected or has aged since.

One cache belongs to one ranker, which is one released version: versions cannot mix. Slots are
preallocated and bounded; the user asked for longest ago leaves first. The lock is held for bookkeeping
only, never while states are copied: who reads a slot pins it, and a slot that is being written is in
nobody's reach until it is whole.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from compression.registry import ModelShape
from features.sequence import count_events
from inference.types import Tensors

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

# Of bookkeeping per user, and per event: a wide event's bytes.
_ENTRY_BYTES: Final = 300
_EVENT_BYTES: Final = 24


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What is kept for each history that was asked for, all [users].

    slots: where, -1 for nowhere. known: how many of its first events have their keys and values there.
    same: it is the whole history, so its user vector is there, too. retrieved: and what was retrieved.
    """

    slots: Int64
    known: Int64
    same: Bool
    retrieved: Bool


class Retrieved(NamedTuple):
    """Items [users, n] int64 and scores [users, n] float32 that were retrieved for user vectors."""

    items: Int64
    scores: Float32

    def of(self, users: Int64 | int) -> Retrieved:
        return Retrieved(self.items[users], self.scores[users])

    def put(self, users: Int64 | Bool, found: Retrieved) -> None:
        self.items[users] = found.items
        self.scores[users] = found.scores


@dataclass(slots=True, eq=False)
class _Entry:
    slot: int
    history: bytes
    precision: str
    retrieved: bool


@dataclass(slots=True)
class _Slots:
    """Which slots are free, which are read just now, and which are to be freed after that."""

    free: list[int]
    pins: list[int]
    left: set[int] = field(default_factory=set)

    def give_back(self, slot: int) -> None:
        if self.pins[slot]:
            self.left.add(slot)
        else:
            self.free.append(slot)

    def unpin(self, slot: int) -> None:
        self.pins[slot] -= 1
        if not self.pins[slot] and slot in self.left:
            self.left.remove(slot)
            self.free.append(slot)


class _Write(NamedTuple):
    """The states of one of the users to keep, on their way into a slot that has the first `known` events."""

    place: int
    user: int
    entry: _Entry
    known: int


class UserCache:
    """For a model of one shape. Safe to call from several threads."""

    def __init__(self, model: ModelShape, slots: int, retrieved: int) -> None:
        """`retrieved`: how many items are retrieved for a user."""
        states = (slots, model.layers, model.heads, model.max_history, model.dim // model.heads)
        # Zeros take no memory before they are written, and no number in a slot is ever infinite.
        self._keys = np.zeros(states, np.float32)
        self._values = np.zeros(states, np.float32)
        self._vectors = np.zeros((slots, model.dim), np.float32)
        self._items = np.zeros((slots, retrieved), np.int64)
        self._scores = np.zeros((slots, retrieved), np.float32)
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._slots = _Slots(list(range(slots))[::-1], [0] * slots)
        self._lock = threading.Lock()

    @classmethod
    def within(cls, budget_mb: float, model: ModelShape, retrieved: int) -> UserCache | None:
        """As many users as fit into so many MiB; None where that is not one."""
        slots = int(budget_mb * 2**20 / cls.user_bytes(model, retrieved))
        return cls(model, slots, retrieved) if slots else None

    @staticmethod
    def user_bytes(model: ModelShape, retrieved: int) -> int:
        """Memory of one user, at most."""
        states = 2 * model.layers * model.max_history * model.dim + model.dim
        return 4 * states + 12 * retrieved + _EVENT_BYTES * model.max_history + _ENTRY_BYTES

    def __len__(self) -> int:
        """Users kept."""
        return len(self._entries)

    @property
    def slots(self) -> int:
        return len(self._keys)

    @contextmanager
    def find(self, users: Sequence[int], histories: Sequence[bytes], precision: str) -> Iterator[Found]:
        """What is kept of these histories (`features.sequence.newest_events`). It stays where it is until
        the block ends; copy it out there. States computed in another precision are not found."""
        slots = np.full(len(users), -1, np.int64)
        known = np.zeros(len(users), np.int64)
        same = np.zeros(len(users), np.bool_)
        retrieved = np.zeros(len(users), np.bool_)
        pinned: list[int] = []
        with self._lock:
            for row, (user, history) in enumerate(zip(users, histories, strict=True)):
                entry = self._entries.get(user)
                if entry is None or entry.precision != precision:
                    continue
                if entry.history == history:
                    known[row], same[row], retrieved[row] = count_events(history), True, entry.retrieved
                elif history.startswith(entry.history):
                    known[row] = count_events(entry.history)
                elif entry.history.startswith(history):
                    # Asked late. Only the vector after its last event is gone.
                    known[row] = count_events(history) - 1
                if not known[row]:
                    continue
                slots[row] = entry.slot
                self._slots.pins[entry.slot] += 1
                self._entries.move_to_end(user)
                pinned.append(entry.slot)
        try:
            yield Found(slots, known, same, retrieved)
        finally:
            if pinned:
                with self._lock:
                    for slot in pinned:
                        self._slots.unpin(slot)

    def states(self, slots: Int64, batch: int, history: int) -> Tensors:
        """A copy of keys and values, padded to a shape; only the known events of a row mean anything."""
        tensors: Tensors = {}
        for name, kept in (("keys", self._keys), ("values", self._values)):
            copied = np.empty((batch, *kept.shape[1:3], history, kept.shape[4]), np.float32)
            copied[len(slots) :] = 0
            # User by user: an index of all of them copies everything twice.
            for row, slot in enumerate(slots.tolist()):
                copied[row] = kept[slot, :, :, :history]
            tensors[name] = copied
        return tensors

    def vectors(self, slots: Int64) -> Float32:
        """The user vectors [users, dim] of whole histories."""
        return self._vectors[slots]

    def retrieved(self, slots: Int64) -> Retrieved:
        return Retrieved(self._items[slots], self._scores[slots])

    def keep(
        self,
        users: Sequence[int],
        histories: Sequence[bytes],
        states: Tensors,
        rows: Int64,
        vectors: Float32,
        retrieved: Retrieved,
        has_retrieved: Bool,
        precision: str,
    ) -> None:
        """Keep the `keys` and `values` in some rows of a cut, and per user the vector, and what was
        retrieved where `has_retrieved`. What is kept and as long already stays."""
        writes = self._reserve(users, histories, has_retrieved.tolist(), precision)
        if not writes:
            return
        try:
            for write in writes:
                at = write.place
                self._write(write, states, int(rows[at]), vectors[at], retrieved.of(at))
        except BaseException:
            with self._lock:
                for write in writes:
                    self._slots.give_back(write.entry.slot)
            raise
        with self._lock:
            for write in writes:
                self._publish(write)

    def _write(self, write: _Write, states: Tensors, row: int, vector: Float32, retrieved: Retrieved) -> None:
        slot, new = write.entry.slot, slice(write.known, count_events(write.entry.history))
        self._keys[slot, :, :, new] = states["keys"][row, :, :, new]
        self._values[slot, :, :, new] = states["values"][row, :, :, new]
        self._vectors[slot] = vector
        self._items[slot], self._scores[slot] = retrieved

    def _reserve(
        self, users: Sequence[int], histories: Sequence[bytes], has_retrieved: Sequence[bool], precision: str
    ) -> list[_Write]:
        """A slot for each user whose states are news, out of everybody's reach until it is published."""
        longest: dict[int, int] = {}
        for place, (user, history) in enumerate(zip(users, histories, strict=True)):
            before = longest.get(user)
            if before is None or len(history) > len(histories[before]):
                longest[user] = place
        writes: list[_Write] = []
        with self._lock:
            for user, place in longest.items():
                history, entry = histories[place], self._entries.get(user)
                known = 0
                if entry is not None and entry.precision == precision:
                    same = entry.history == history
                    if entry.history.startswith(history) and not (
                        same and has_retrieved[place] and not entry.retrieved
                    ):
                        continue
                    if history.startswith(entry.history) and not self._slots.pins[entry.slot]:
                        known = count_events(entry.history)
                if known and entry is not None:
                    del self._entries[user]
                    slot = entry.slot
                else:
                    free = self._free_slot()
                    if free is None:
                        break
                    slot = free
                kept = _Entry(slot, history, precision, has_retrieved[place])
                writes.append(_Write(place, user, kept, known))
        return writes

    def _free_slot(self) -> int | None:
        """A free slot, the oldest user's if need be; None while all are read or written."""
        if not self._slots.free:
            for user, entry in self._entries.items():
                if not self._slots.pins[entry.slot]:
                    del self._entries[user]
                    return entry.slot
            return None
        return self._slots.free.pop()

    def _publish(self, write: _Write) -> None:
        other = self._entries.get(write.user)
        if other is not None:
            if other.precision == write.entry.precision and other.history.startswith(write.entry.history):
                self._slots.give_back(write.entry.slot)
                return
            self._slots.give_back(other.slot)
        self._entries[write.user] = write.entry
        self._entries.move_to_end(write.user)
