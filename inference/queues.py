"""What waits for a lane, in order: by priority, then tier, then who came first.

A queue's entry is a position in a group, the items that were submitted together and are answered
together. Nothing here runs, and time is passed in.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

from inference.errors import InferenceError
from inference.types import Priority

_TIERS: Final = 16
_RANK: Final[dict[Priority, int]] = {"high": 0, "normal": _TIERS, "low": 2 * _TIERS}
# Levels below this one are urgent: they go without company that would make them wait.
URGENT: Final = _TIERS
LAST: Final = 3 * _TIERS


class Work(Protocol):
    """What the batcher reads from an item. `deadline_s` is on the event loop's clock; within a priority
    the higher `tier` goes first."""

    @property
    def priority(self) -> Priority: ...
    @property
    def tier(self) -> int: ...
    @property
    def deadline_s(self) -> float | None: ...


T = TypeVar("T", bound=Work)
R = TypeVar("R")


def level_of(item: Work) -> int:
    """Where in the order an item goes: by priority, within it by tier, the highest first."""
    return _RANK[item.priority] + _TIERS - 1 - min(max(item.tier, 0), _TIERS - 1)


class Group(Generic[T, R]):
    """The items of one `submit`, answered together once each has its answer."""

    __slots__ = ("answers", "done", "entered_s", "items", "key", "missing")

    def __init__(
        self, items: Sequence[T], key: Hashable, done: asyncio.Future[None], entered_s: float
    ) -> None:
        self.items = items
        self.key = key
        self.answers: list[R | InferenceError | None] = [None] * len(items)
        self.missing = len(items)
        self.done = done
        self.entered_s = entered_s

    def wants(self, position: int) -> bool:
        return self.answers[position] is None and not self.done.done()

    def answer(self, position: int, answer: R | InferenceError) -> bool:
        """Keep the first answer given; False when there was one, or nobody waits any more."""
        if self.answers[position] is not None or self.done.done():
            return False
        self.answers[position] = answer
        self.missing -= 1
        if not self.missing:
            self.done.set_result(None)
        return True


Entry = tuple[Group[T, R], int]


class Queues(Generic[T, R]):
    """One queue per level, the first to go first; `len` is how many wait in all of them."""

    def __init__(self) -> None:
        self._by_level: dict[int, deque[Entry[T, R]]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Entry[T, R]]:
        for queue in self._by_level.values():
            yield from queue

    @property
    def urgent(self) -> int:
        """How many wait that go without company."""
        return self.upto(URGENT - 1)

    @property
    def first(self) -> tuple[int, Group[T, R]]:
        """Level and group of what goes next; something must wait."""
        level = next(level for level, queue in self._by_level.items() if queue)
        return level, self._by_level[level][0][0]

    @property
    def oldest_s(self) -> float:
        """When the item that has waited longest came; something must wait."""
        return min(queue[0][0].entered_s for queue in self._by_level.values() if queue)

    def upto(self, level: int) -> int:
        """How many wait at a level and before it."""
        waiting = 0
        for at, queue in self._by_level.items():
            if at > level:
                break
            waiting += len(queue)
        return waiting

    def add(self, level: int, entry: Entry[T, R]) -> None:
        queue = self._by_level.get(level)
        if queue is None:
            self._by_level[level] = queue = deque()
            self._by_level = dict(sorted(self._by_level.items()))
        queue.append(entry)
        self._size += 1

    def take(self, key: Hashable, most: int, *, skip: int, upto: int) -> list[Entry[T, R]]:
        """Up to `most` entries of one key, highest level first and none beyond `upto`, past the first `skip`
        of them. What wants no answer any more is dropped."""
        taken: list[Entry[T, R]] = []
        for level, queue in self._by_level.items():
            if level > upto:
                break
            passed: list[Entry[T, R]] = []
            while queue and len(taken) < most:
                entry = queue.popleft()
                group, position = entry
                if group.key != key or skip:
                    skip -= group.key == key
                    passed.append(entry)
                elif group.wants(position):
                    taken.append(entry)
            queue.extendleft(reversed(passed))
        self._count()
        return taken

    def keep(self, wanted: Callable[[Entry[T, R]], bool]) -> None:
        """Drop what is not wanted."""
        for queue in self._by_level.values():
            kept = [entry for entry in queue if wanted(entry)]
            if len(kept) < len(queue):
                queue.clear()
                queue.extend(kept)
        self._count()

    def clear(self) -> None:
        self._by_level.clear()
        self._size = 0

    def _count(self) -> None:
        self._size = sum(map(len, self._by_level.values()))


def wants(entry: Entry[Any, Any]) -> bool:
    """Whether somebody still waits for the answer to an entry."""
    return entry[0].wants(entry[1])
