"""The ack sequencer: offsets are released for commit strictly in order, per partition.

Units of work finish out of order, because ranking is asynchronous. A partition's committed offset
may only move over work that is finished, so a finished unit waits here for those before it. Stock
Faust 0.15.3 commits past a single unfinished message (faust-streaming issue 606); this does not.

>>> sequencer = AckSequencer()
>>> first, second = sequencer.begin(next_offset=5), sequencer.begin(next_offset=9)
>>> sequencer.finish(second), sequencer.committable
(False, None)
>>> sequencer.finish(first), sequencer.committable
(True, 9)
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Slot:
    """A run of consecutive records of one partition, up to but not including `next_offset`."""

    next_offset: int
    finished: bool = False


class AckSequencer:
    """The order book of one partition of one assignment. Cheap: constant work per record batch."""

    def __init__(self) -> None:
        self._open: deque[Slot] = deque()
        self._committable: int | None = None

    def begin(self, next_offset: int) -> Slot:
        """Note a unit in arrival order; offsets only grow."""
        slot = Slot(next_offset)
        self._open.append(slot)
        return slot

    def finish(self, slot: Slot) -> bool:
        """A unit is answered and its results are in Kafka. True if the committable offset moved."""
        slot.finished = True
        moved = False
        while self._open and self._open[0].finished:
            self._committable = self._open.popleft().next_offset
            moved = True
        return moved

    @property
    def committable(self) -> int | None:
        """The offset to commit (next to read), None before the first release."""
        return self._committable

    @property
    def unfinished(self) -> int:
        """Units begun and not yet released."""
        return len(self._open)
