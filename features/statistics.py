"""Item statistics updated online: popularity and what follows what, with decay by event time.

A weight decays by half every half-life. Instead of shrinking old weights, new ones grow (forward
decay): an event at time t adds behaviour weight × 2^(t / half-life), and only the ratio of two weights
ever matters. That number overflows a double within weeks, so its logarithm is kept, here and in
Redis: adding is log2(2ᵃ + 2ᵇ), the order is the same, and a replay of 2017 followed by live
events needs no landmark and no rescaling.

Statistics are approximate: increments wait in memory for `flush`, a killed process loses the last
ones, and a flush that timed out may count twice. Nothing that must be exact is kept here.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from features import keys
from features.sequence import FENCE_BYTES, HEADER_BYTES, NARROW, NARROW_EVENT, WIDE_EVENT
from features.settings import FeatureSettings
from features.store import Append, Appended, FeatureStore, Neighbours, log2_add

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

# A transition seen once is weak evidence: its share is weight / (sum of weights + this).
TRANSITION_PRIOR: Final = 2.0
# A list asked for is not asked for again until then, should its answer never come.
_READING_S: Final = 1.0
_MOST_MISSED: Final = 4096


@dataclass(frozen=True, slots=True, eq=False)
class ItemWeights:
    """Items, heaviest first: ids int64 [n], weights float32 [n] between 0 and 1.

    Of transitions the weight is the share of those who went there; of popularity it is relative to
    the most popular.
    """

    items: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.items)


NOTHING: Final = ItemWeights(np.empty(0, np.int64), np.empty(0, np.float32))


class StatisticsReader(Protocol):
    """What finds candidates reads: `ItemStatistics`, or the same counted over a log."""

    def transitions(self, items: Sequence[int]) -> list[ItemWeights]:
        """What follows each item."""
        ...

    def categories(self, categories: Sequence[int]) -> list[ItemWeights]:
        """What is popular in each category."""
        ...

    def popular(self) -> ItemWeights:
        """What is popular."""
        ...


class ItemStatistics:
    """A bounded view, kept in the process, of statistics that all processes share in the store.

    The stream's loop calls `needed`, `absorb` and `observe` around each append, and `flush` and
    `refresh` from timers. `transitions`, `category` and `popular` only read memory, from any
    thread; what they miss is read together with the next append.
    """

    def __init__(
        self,
        store: FeatureStore,
        *,
        settings: FeatureSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._settings = settings = settings or FeatureSettings()
        self._clock = clock
        fresh_s = settings.statistics_fresh_ms / 1000
        self._transitions = _Lists(settings.statistics_cached, fresh_s)
        self._categories = _Lists(settings.statistics_cached, fresh_s)
        self._popular = NOTHING
        self._behaviors = tuple(math.log2(weight) for weight in settings.behavior_weights)
        self._per_popularity = 1.0 / settings.popularity_half_life_s
        self._per_transition = 1.0 / settings.transition_half_life_s
        self._newest_s = 0
        self._pending = _Increments()
        self.dropped = 0
        """Clicks whose increments found no room while the store was away."""

    @property
    def limit(self) -> int:
        """How many members of a list are worth reading: the `limit` of `FeatureStore.append`."""
        return max(self._settings.transition_limit, self._settings.category_limit)

    @property
    def pending(self) -> int:
        """Increments that wait for `flush`."""
        return self._pending.count

    def needed(self, appends: Sequence[Append]) -> list[str]:
        """The statistics worth reading together with these clicks, by name; none of them fresh.

        First what the clicks are about, then what readers have missed.
        """
        now_s = self._clock()
        names: list[str] = []
        transitions, categories = self._transitions, self._categories
        newest_s = self._newest_s
        room = self._settings.statistics_reads
        for event in appends:
            if len(names) >= room:
                break
            _, item, category, _, timestamp, _, _, _ = event
            newest_s = max(newest_s, timestamp)
            if transitions.take(item, now_s):
                names.append(keys.transitions(item))
            if categories.take(category, now_s):
                names.append(keys.category(category))
        self._newest_s = newest_s
        names += map(keys.transitions, transitions.take_missed(room - len(names), now_s))
        names += map(keys.category, categories.take_missed(room - len(names), now_s))
        return names

    def absorb(self, names: Sequence[str], neighbours: Sequence[Neighbours]) -> None:
        """Take in what was read under these names."""
        now_s = self._clock()
        after: list[tuple[int, Neighbours]] = []
        within: list[tuple[int, Neighbours]] = []
        for name, read in zip(names, neighbours, strict=True):
            (after if name[0] == "t" else within).append((int(name[3:-1]), read))
        settings = self._settings
        newest_log2 = self._newest_s * self._per_transition
        self._transitions.put(_shares(after, settings.transition_limit, newest_log2), now_s)
        self._categories.put(_relative(within, settings.category_limit), now_s)

    def observe(self, appends: Sequence[Append], appended: Sequence[Appended]) -> None:
        """Count what was applied; what the store had seen before counts nothing."""
        pending = self._pending
        if pending.count > self._settings.pending_max:
            self.dropped += len(appends)
            return
        behaviors = self._behaviors
        per_popularity, per_transition = self._per_popularity, self._per_transition
        for (_, item, category, behavior, timestamp, _, _, _), (applied, sequence, _) in zip(
            appends, appended, strict=True
        ):
            if not applied:
                continue
            weight = behaviors[behavior]
            popularity = weight + timestamp * per_popularity
            pending.add(pending.popular, item, popularity)
            pending.add_to(pending.categories, category, item, popularity)
            previous = previous_item(sequence)
            if previous is not None and previous != item:
                pending.add_to(pending.transitions, previous, item, weight + timestamp * per_transition)

    async def flush(self) -> None:
        """Write what was counted, `flush_increments` to a round trip. After `StoreUnavailable` what is
        not written waits for the next flush."""
        most = self._settings.flush_increments
        # Not what is counted meanwhile: that would never end where clicks come as fast as this writes.
        for _ in range(0, self._pending.count, most):
            part = self._pending.take(most)
            try:
                await self._store.increment(part)
            except (ConnectionError, asyncio.CancelledError):
                self._pending.merge(part)
                raise

    async def refresh(self) -> None:
        """Read the popular items of all anew."""
        (popular,) = await self._store.neighbours([keys.POPULAR], self._settings.popular_limit)
        if len(popular.items):
            ((_, self._popular),) = _relative([(0, popular)], self._settings.popular_limit)

    def transitions(self, items: Sequence[int]) -> list[ItemWeights]:
        """What follows each item."""
        return self._transitions.read(items, self._clock())

    def categories(self, categories: Sequence[int]) -> list[ItemWeights]:
        """What is popular in each category."""
        return self._categories.read(categories, self._clock())

    def popular(self) -> ItemWeights:
        """What is popular."""
        return self._popular


def previous_item(sequence: bytes) -> int | None:
    """The last item but one of a packed sequence; None where there is none."""
    if sequence[0] == NARROW:
        if len(sequence) < HEADER_BYTES + FENCE_BYTES * sequence[1] + 2 * NARROW_EVENT.itemsize:
            return None
        return int.from_bytes(sequence[-24:-20], "little")
    if len(sequence) < HEADER_BYTES + FENCE_BYTES * sequence[1] + 2 * WIDE_EVENT.itemsize:
        return None
    return int.from_bytes(sequence[-48:-40], "little")


class _Lists:
    """Item lists by id, the least recently taken or put dropped first, each fresh for a while."""

    def __init__(self, most: int, fresh_s: float) -> None:
        self._most = most
        self._fresh_s = fresh_s
        self._lists: OrderedDict[int, tuple[ItemWeights, float]] = OrderedDict()
        self._missed: set[int] = set()

    def take(self, id_: int, now_s: float) -> bool:
        """Whether the caller should read this list: it is not fresh and nobody is reading it."""
        kept = self._lists.get(id_)
        if kept is not None and now_s < kept[1]:
            self._lists.move_to_end(id_)
            return False
        self._lists[id_] = (NOTHING if kept is None else kept[0], now_s + _READING_S)
        return True

    def take_missed(self, room: int, now_s: float) -> list[int]:
        taken: list[int] = []
        while len(taken) < room and self._missed:
            id_ = self._missed.pop()
            if self.take(id_, now_s):
                taken.append(id_)
        return taken

    def put(self, lists: Sequence[tuple[int, ItemWeights]], now_s: float) -> None:
        expires_s = now_s + self._fresh_s
        for id_, weights in lists:
            self._lists[id_] = (weights, expires_s)
        while len(self._lists) > self._most:
            self._lists.popitem(last=False)

    def read(self, ids: Sequence[int], now_s: float) -> list[ItemWeights]:
        # Other threads call this: single dictionary and set operations only.
        answer: list[ItemWeights] = []
        for id_ in ids:
            kept = self._lists.get(id_)
            if (kept is None or now_s >= kept[1]) and len(self._missed) < _MOST_MISSED:
                self._missed.add(id_)
            answer.append(NOTHING if kept is None else kept[0])
        return answer


class _Increments:
    """What was counted and not yet written, as log2 of the sums."""

    def __init__(self) -> None:
        self.transitions: dict[int, dict[int, float]] = {}
        self.categories: dict[int, dict[int, float]] = {}
        self.popular: dict[int, float] = {}
        self.count = 0

    def add(self, kept: dict[int, float], item: int, log2: float) -> None:
        before = kept.get(item)
        if before is None:
            kept[item] = log2
            self.count += 1
        else:
            kept[item] = log2_add(before, log2)

    def add_to(self, of: dict[int, dict[int, float]], id_: int, item: int, log2: float) -> None:
        kept = of.get(id_)
        if kept is None:
            of[id_] = {item: log2}
            self.count += 1
        else:
            self.add(kept, item, log2)

    def take(self, most: int) -> dict[str, dict[int, float]]:
        """Take `most` increments out, or all there are, by the names of their statistics."""
        part: dict[str, dict[int, float]] = {}
        room = most
        for name_of, of in ((keys.transitions, self.transitions), (keys.category, self.categories)):
            while of and room:
                id_, kept = of.popitem()
                taken = part[name_of(id_)] = _take(kept, room)
                room -= len(taken)
                if kept:
                    of[id_] = kept
        if self.popular and room:
            taken = part[keys.POPULAR] = _take(self.popular, room)
            room -= len(taken)
        self.count -= most - room
        return part

    def merge(self, part: dict[str, dict[int, float]]) -> None:
        for name, kept in part.items():
            for item, log2 in kept.items():
                if name == keys.POPULAR:
                    self.add(self.popular, item, log2)
                else:
                    of = self.transitions if name[0] == "t" else self.categories
                    self.add_to(of, int(name[3:-1]), item, log2)


def _take(kept: dict[int, float], most: int) -> dict[int, float]:
    """Take `most` entries out, or all."""
    return dict(kept.popitem() for _ in range(min(most, len(kept))))


def _shares(
    lists: Sequence[tuple[int, Neighbours]], limit: int, newest_log2: float
) -> list[tuple[int, ItemWeights]]:
    """Each weight as it stands now over their sum."""

    def shares(logs: Float64, starts: Int64, lengths: Int64) -> Float64:
        # The bound keeps a sum finite when event time goes far back: a replay after live events.
        weights = np.exp2(np.minimum(logs - newest_log2, 900.0))
        sums = np.add.reduceat(weights, starts) + TRANSITION_PRIOR
        return np.asarray(weights / np.repeat(sums, lengths))

    return _weighed(lists, limit, shares)


def _relative(lists: Sequence[tuple[int, Neighbours]], limit: int) -> list[tuple[int, ItemWeights]]:
    """Each weight over the heaviest of its list."""
    return _weighed(
        lists, limit, lambda logs, starts, lengths: np.exp2(logs - np.repeat(logs[starts], lengths))
    )


def _weighed(
    lists: Sequence[tuple[int, Neighbours]], limit: int, weigh: Callable[[Float64, Int64, Int64], Float64]
) -> list[tuple[int, ItemWeights]]:
    """All lists in one pass: `weigh` has the logarithms of all, where each list that is not empty starts
    among them, and how long it is."""
    lengths = [min(len(read.items), limit) for _, read in lists]
    logs = [read.log2_weights[:limit] for _, read in lists if len(read.items)]
    if not logs:
        return [(id_, NOTHING) for id_, _ in lists]
    filled = np.array([length for length in lengths if length])
    return _split(lists, lengths, weigh(np.concatenate(logs), np.cumsum(filled) - filled, filled))


def _split(
    lists: Sequence[tuple[int, Neighbours]], lengths: Sequence[int], weights: npt.NDArray[np.float64]
) -> list[tuple[int, ItemWeights]]:
    narrow = weights.astype(np.float32)
    answer: list[tuple[int, ItemWeights]] = []
    at = 0
    for (id_, read), length in zip(lists, lengths, strict=True):
        if length:
            # Copies: a view would keep the whole batch in memory for as long as one list is kept.
            answer.append((id_, ItemWeights(read.items[:length].copy(), narrow[at : at + length].copy())))
            at += length
        else:
            answer.append((id_, NOTHING))
    return answer
