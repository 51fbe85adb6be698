"""Encoded histories of active users, so that the same question is not computed twice.

A history whose events are all known costs no encoding, no retrieval, and no scoring of the candidates it
was scored with last; one that has grown by a few events costs those events alone (`append` in
`compression.training.export`). What is kept is compared byte for byte with what is asked, so an answer never
rests on a history that was trimmed, corrected or has aged since.

Of a model without states what is kept is what follows from whole histories, some kilobytes a user, and a
history that has grown is encoded anew.

One cache belongs to one ranker, which is one released version: versions cannot mix. Slots are
preallocated and bounded; the user asked for longest ago leaves first. The lock is held for bookkeeping
only, never while states are copied: who reads a slot pins it, and a slot that is being written is in
nobody's reach until it is whole.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from compression.releases.registry import ModelShape
from features.sequence import MAX_EVENTS
from inference import memory
from inference.derived import Derived
from inference.types import Tensors

Int64 = npt.NDArray[np.int64]

# Of bookkeeping per user, and per event: a wide event's bytes.
_ENTRY_BYTES: Final = 300
_EVENT_BYTES: Final = 24
# A megabyte or two.
_USERS_A_STEP: Final = 16


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What is kept for each history that was asked for, all [users]. It stays where it is until the block
    ends; copy it out there.

    slots: where, -1 for nowhere. known: how many of its first events have their states there.
    same: it is the whole history, so what is derived from it is there, too.
    """

    slots: list[int]
    known: list[int]
    same: list[bool]
    _unpin: Callable[[Sequence[int]], None]

    def __enter__(self) -> Found:
        return self

    def __exit__(self, *_: object) -> None:
        self._unpin(self.slots)


@dataclass(slots=True, eq=False)
class _Entry:
    slot: int
    history: bytes
    events: int
    precision: str


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

    def unpin(self, slots: Sequence[int]) -> None:
        """None is of a slot that is none."""
        pins, left = self.pins, self.left
        for slot in slots:
            if slot < 0:
                continue
            pins[slot] -= 1
            if left and not pins[slot] and slot in left:
                left.remove(slot)
                self.free.append(slot)


class Computed(NamedTuple):
    """The states of some of the users to keep: which of these they are, and in which rows theirs stand."""

    users: Sequence[int]
    rows: Sequence[int]
    states: Tensors


class _Write(NamedTuple):
    """The states of one of the users to keep, on their way into a slot that has the first `known` events."""

    place: int
    user: Hashable
    entry: _Entry
    known: int


class UserCache:
    """For a model of one shape. Safe to call from several threads."""

    def __init__(
        self,
        model: ModelShape,
        slots: int,
        *,
        retrieved: int,
        listed: int,
    ) -> None:
        """`retrieved`: how many items are retrieved for a user. `listed`: how many scores are kept."""
        self._names = model.state_names
        # Of the cache that was freed last, where it was as large: no number in a slot is ever infinite.
        self._states = memory.lasting((slots, len(self._names), model.max_history, model.dim), np.float32)
        self._derived = Derived.nothing(slots, model.dim, retrieved, listed)
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._slots = _Slots(list(range(slots))[::-1], [0] * slots)
        self._lock = threading.Lock()

    @classmethod
    def within(
        cls,
        budget_mb: float,
        model: ModelShape,
        *,
        retrieved: int,
        listed: int,
    ) -> UserCache | None:
        """As many users as fit into so many MiB; None where that is not one."""
        slots = int(budget_mb * 2**20 / cls.user_bytes(model, retrieved=retrieved, listed=listed))
        if not slots:
            return None
        return cls(model, slots, retrieved=retrieved, listed=listed)

    @staticmethod
    def user_bytes(model: ModelShape, *, retrieved: int, listed: int) -> int:
        """Memory of one user, at most."""
        states = len(model.state_names) * model.max_history * model.dim * 4
        derived = Derived.nothing(1, model.dim, retrieved, listed).user_bytes
        return states + derived + _EVENT_BYTES * min(model.max_history, MAX_EVENTS) + _ENTRY_BYTES

    def __len__(self) -> int:
        """Users kept."""
        return len(self._entries)

    @property
    def slots(self) -> int:
        return len(self._states)

    def make_room(self, users: int) -> Iterator[None]:
        """Have memory for the first so many users, some of them with every step: what writes a slot of which
        none was ever written waits for the system's pages."""
        for start in range(0, min(users, self.slots), _USERS_A_STEP):
            memory.populate(self._states[start : min(start + _USERS_A_STEP, users)])
            yield

    @property
    def listed(self) -> int:
        """How many scores are kept of a user."""
        return self._derived.listed

    def find(
        self, users: Sequence[Hashable], histories: Sequence[bytes], events: Sequence[int], precision: str
    ) -> Found:
        """What is kept of these histories (`inference.histories`), each of so many events, to be used in a
        `with`. States computed in another precision are not found."""
        slots, known, same = [-1] * len(users), [0] * len(users), [False] * len(users)
        get, move_to_end, pins = self._entries.get, self._entries.move_to_end, self._slots.pins
        with self._lock:
            for row, (user, history) in enumerate(zip(users, histories, strict=True)):
                entry = get(user)
                if entry is None or entry.precision != precision or not history:
                    continue
                if entry.history == history:
                    known[row], same[row] = entry.events, True
                elif history.startswith(entry.history):
                    known[row] = entry.events
                elif entry.history.startswith(history):
                    # Asked late. Only the vector after its last event is gone.
                    known[row] = events[row] - 1
                if not known[row]:
                    continue
                slots[row] = entry.slot
                pins[entry.slot] += 1
                move_to_end(user)
        return Found(slots, known, same, self._unpin)

    def _unpin(self, slots: Sequence[int]) -> None:
        with self._lock:
            self._slots.unpin(slots)

    def states(self, slots: Sequence[int], batch: int, history: int, *, lend: bool = False) -> Tensors:
        """A copy of the states by name, padded to a shape; only the known events of a row mean anything.

        `lend`: to be read only, and only until the block of `find` ends. Then one user's are not copied where
        they fill the shape.
        """
        kept = self._states
        if lend and batch == len(slots) == 1:
            return dict(zip(self._names, kept[slots[0], :, None, :history], strict=True))
        copied = np.empty((len(self._names), batch, history, kept.shape[3]), np.float32)
        copied[:, len(slots) :] = 0
        # User by user: an index of all of them copies everything twice.
        for row, slot in enumerate(slots):
            copied[:, row] = kept[slot, :, :history]
        return dict(zip(self._names, copied, strict=True))

    @property
    def derived(self) -> Derived:
        """What follows from whole histories, by slot."""
        return self._derived

    def keep(
        self,
        users: Sequence[Hashable],
        histories: Sequence[bytes],
        events: Sequence[int],
        computed: Sequence[Computed],
        derived: Derived,
        places: Sequence[int],
        precision: str,
    ) -> None:
        """Keep, per user, what was computed of the states, and what is derived at a place. What is kept and
        longer already stays. Of whom nothing was computed, what is derived where all states are kept."""
        part, row = np.full(len(users), -1), np.zeros(len(users), np.int64)
        for number, one in enumerate(computed):
            part[one.users], row[one.users] = number, one.rows
        without = (part < 0) & bool(self._names)
        writes = self._reserve(users, histories, events, precision, without.tolist())
        if not writes:
            return
        try:
            slots = np.array([write.entry.slot for write in writes])
            at = np.array([write.place for write in writes])
            self._derived.put(slots, derived, np.asarray(places)[at])
            self._write(writes, slots, computed, part[at], row[at])
        except BaseException:
            with self._lock:
                for write in writes:
                    self._slots.give_back(write.entry.slot)
            raise
        with self._lock:
            for write in writes:
                self._publish(write)

    def _write(
        self,
        writes: Sequence[_Write],
        slots: Int64,
        computed: Sequence[Computed],
        part: Int64,
        row: Int64,
    ) -> None:
        """What was computed of each [writes]: in which part, -1 for nothing, and in which row."""
        known = np.array([write.known for write in writes])
        end = np.array([write.entry.events for write in writes])
        # Most have one new event: all of these in one go.
        single = end - known == 1
        for number, (_, _, states) in enumerate(computed):
            here = part == number
            one, others = here & single, (here & ~single).nonzero()[0].tolist()
            for place, name in enumerate(self._names):
                kept, found = self._states[:, place], states[name]
                kept[slots[one], known[one]] = found[row[one], known[one]]
                for write in others:
                    events = slice(known[write], end[write])
                    kept[slots[write], events] = found[row[write], events]

    def _reserve(
        self,
        users: Sequence[Hashable],
        histories: Sequence[bytes],
        events: Sequence[int],
        precision: str,
        without: Sequence[bool],
    ) -> list[_Write]:
        """A slot for each user of whom there are news, out of everybody's reach until it is published; of who
        is `without` states, only one that has all of them."""
        longest: dict[Hashable, int] = {}
        for place, (user, history) in enumerate(zip(users, histories, strict=True)):
            before = longest.get(user)
            if history and (before is None or len(history) > len(histories[before])):
                longest[user] = place
        writes: list[_Write] = []
        with self._lock:
            for user, place in longest.items():
                history, entry = histories[place], self._entries.get(user)
                known = 0
                if entry is not None and entry.precision == precision:
                    if len(entry.history) > len(history) and entry.history.startswith(history):
                        continue
                    if history.startswith(entry.history) and not self._slots.pins[entry.slot]:
                        known = entry.events
                if without[place] and known < events[place]:
                    continue
                if known and entry is not None:
                    del self._entries[user]
                    entry.history, entry.events = history, events[place]
                else:
                    free = self._free_slot()
                    if free is None:
                        break
                    entry = _Entry(free, history, events[place], precision)
                writes.append(_Write(place, user, entry, known))
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
        other = self._entries.pop(write.user, None)
        if other is not None:
            if other.precision == write.entry.precision and other.history.startswith(write.entry.history):
                self._slots.give_back(write.entry.slot)
                self._entries[write.user] = other
                return
            self._slots.give_back(other.slot)
        self._entries[write.user] = write.entry
