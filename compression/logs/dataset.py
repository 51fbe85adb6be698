"""A log as per-user sequences, and which of their events are for learning and which for judging."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from compression.logs.item_lists import ItemListReader, is_item_lists
from compression.logs.log_reader import EventChunk, LogReader, ReadReport
from features.encoding import HistoryArrays, Vocabulary
from features.sequence import SequenceBatch

MAX_EVENTS: Final = 20_000_000
SplitName = Literal["leave-one-out", "temporal"]

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Every user's events, oldest first, users one after another.

    User u's events are at `offsets[u]` to `offsets[u + 1]` of the other columns.
    """

    users: Int64
    offsets: Int64
    items: Int64
    categories: Int64
    behaviors: Int64
    timestamps: Int64

    def __len__(self) -> int:
        return len(self.items)

    def user_of(self, positions: Int64) -> Int64:
        return np.searchsorted(self.offsets, positions, side="right") - 1

    def windows(self, starts: Int64, ends: Int64) -> SequenceBatch:
        """The events [start, end) of each window, as the encoder takes them."""
        lengths = ends - starts
        first = np.cumsum(lengths) - lengths
        at = np.arange(int(lengths.sum())) + np.repeat(starts - first, lengths)
        return SequenceBatch(
            lengths, self.items[at], self.categories[at], self.behaviors[at], self.timestamps[at]
        )

    def before(self, positions: Int64, length: int) -> SequenceBatch:
        """What was known of a user just before each position: its last `length` events."""
        return self.windows(np.maximum(self.offsets[self.user_of(positions)], positions - length), positions)

    def save(self, path: Path) -> None:
        """As an .npz without pickle."""
        with path.open("wb") as file:
            np.savez(file, **{name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def load(cls, path: Path) -> Sequences:
        """What `save` wrote."""
        with np.load(path, allow_pickle=False) as columns:
            return cls(**{name: columns[name] for name in cls.__slots__})


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Positions to learn from and to judge by.

    User u's events before `train_ends[u]` are for training; each position of `validation` and `test` is
    an event to be predicted from everything of its user before it.
    """

    name: SplitName
    train_ends: Int64
    validation: Int64
    test: Int64

    def train_positions(self, sequences: Sequences) -> Int64:
        mask = np.arange(len(sequences)) < np.repeat(self.train_ends, np.diff(sequences.offsets))
        return np.flatnonzero(mask)

    def with_validation(self, sequences: Sequences) -> Split:
        """The same test, with the validation events to learn from too: for fitting after all is chosen."""
        ends = self.train_ends.copy()
        np.maximum.at(ends, sequences.user_of(self.validation), self.validation + 1)
        return replace(self, train_ends=ends)


@dataclass(frozen=True, slots=True, eq=False)
class Log:
    """A log that was read whole. `left_out` older rows were read but not kept."""

    sequences: Sequences
    report: ReadReport
    left_out: int


def read_log(
    path: str | Path,
    *,
    max_events: int = MAX_EVENTS,
    now_s: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> Log:
    """Stream a log, Taobao's or item lists, into sequences. Of a log longer than `max_events` the last rows
    are kept, so memory is bounded whatever the file's size."""
    reader = (ItemListReader if is_item_lists(path) else LogReader)(path, now_s=now_s)
    kept: deque[EventChunk] = deque()
    rows = left_out = 0
    for chunk in reader.chunks():
        kept.append(chunk)
        rows += len(chunk)
        while rows - len(kept[0]) >= max_events:
            left_out += len(kept[0])
            rows -= len(kept.popleft())
        if progress:
            progress(reader.fraction)
    return Log(to_sequences(kept), reader.report, left_out)


def to_sequences(chunks: deque[EventChunk]) -> Sequences:
    """Events in file order to sequences; events of a user in one second keep the file's order."""

    def column(name: str) -> Int64:
        return np.concatenate([getattr(chunk, name) for chunk in chunks])

    users, timestamps = column("users"), column("timestamps")
    order = np.lexsort((timestamps, users))
    users = users[order]
    distinct, first = np.unique(users, return_index=True)
    return Sequences(
        users=distinct,
        offsets=np.append(first, len(users)),
        items=column("items")[order],
        categories=column("categories")[order],
        behaviors=column("behaviors")[order],
        timestamps=timestamps[order],
    )


def build_vocabulary(
    sequences: Sequences, *, max_items: int, item_buckets: int, category_buckets: int
) -> Vocabulary:
    """Every item of the log, or the `max_items` most frequent. An item's category is its latest one."""
    items, latest, counts = np.unique(sequences.items[::-1], return_index=True, return_counts=True)
    if len(items) > max_items:
        most = np.sort(np.argsort(-counts, kind="stable")[:max_items])
        items, latest = items[most], latest[most]
    categories = np.unique(sequences.categories)
    of_item = sequences.categories[::-1][latest]
    return Vocabulary(
        item_ids=items,
        item_categories=(np.searchsorted(categories, of_item) + 1).astype(np.int32),
        category_ids=categories,
        item_buckets=item_buckets,
        category_buckets=category_buckets,
    )


def split(sequences: Sequences, name: SplitName) -> Split:
    return leave_one_out(sequences) if name == "leave-one-out" else temporal(sequences)


def leave_one_out(sequences: Sequences) -> Split:
    """The last event of each user is the test, the one before it validation, the rest is for training.
    A user of fewer than three events is for training only."""
    starts, ends = sequences.offsets[:-1], sequences.offsets[1:]
    judged = ends - starts >= 3
    return Split(
        "leave-one-out",
        train_ends=np.where(judged, ends - 2, ends),
        validation=ends[judged] - 2,
        test=ends[judged] - 1,
    )


def temporal(sequences: Sequences, *, validation_share: float = 0.1, test_share: float = 0.1) -> Split:
    """The last tenth of the log's events are the test, the tenth before validation. A user's first
    event is never asked for: nothing is known to predict it from."""
    from_validation, from_test = np.quantile(
        sequences.timestamps, [1 - validation_share - test_share, 1 - test_share]
    )
    stamps = sequences.timestamps
    positions = np.arange(len(sequences))
    asked = positions > np.repeat(sequences.offsets[:-1], np.diff(sequences.offsets))
    before = np.add.reduceat((stamps < from_validation).astype(np.int64), sequences.offsets[:-1])
    return Split(
        "temporal",
        train_ends=sequences.offsets[:-1] + before,
        validation=positions[asked & (stamps >= from_validation) & (stamps < from_test)],
        test=positions[asked & (stamps >= from_test)],
    )


def training_windows(
    sequences: Sequences, ends: Int64, length: int, rng: np.random.Generator
) -> tuple[Int64, Int64]:
    """[start, end) windows of at most `length` + 1 events that cover every user's training events, the
    cuts of long users at random places. A window of one event has nothing to predict and is left out."""
    starts = sequences.offsets[:-1]
    counts = ends - starts
    phase = np.where(counts > length + 1, rng.integers(0, length, len(counts)), 0)
    pieces = np.maximum(1, -(-(counts - 1 + phase) // length))
    user = np.repeat(np.arange(len(counts)), pieces)
    number = np.arange(len(user)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first = np.maximum(starts[user], starts[user] - phase[user] + number * length)
    last = np.minimum(ends[user], starts[user] - phase[user] + (number + 1) * length + 1)
    full = last - first >= 2
    return first[full], last[full]


def prefix_windows(sequences: Sequences, ends: Int64, length: int) -> tuple[Int64, Int64]:
    """[start, end) windows of at most `length` + 1 events: one for each training event that has others of
    its user before it, which stands last."""
    starts = sequences.offsets[:-1]
    counts = np.maximum(0, ends - starts - 1)
    user = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(user)) - np.repeat(np.cumsum(counts) - counts, counts)
    last = starts[user] + number + 2
    return np.maximum(starts[user], last - length - 1), last


def before_last(windows: HistoryArrays) -> HistoryArrays:
    """Encoded windows without their last event, which is a target only."""
    return HistoryArrays(
        items=windows.items[:, :-1],
        categories=windows.categories[:, :-1],
        behaviors=windows.behaviors[:, :-1],
        gaps=windows.gaps[:, :-1],
        lengths=np.maximum(windows.lengths - 1, 0).astype(np.int32),
    )


def batches(starts: Int64, ends: Int64, size: int, rng: np.random.Generator) -> Iterator[tuple[Int64, Int64]]:
    """Windows in batches of similar length, batches in random order: little padding, little order."""
    by_length = np.lexsort((rng.random(len(starts)), ends - starts))
    cuts = np.arange(0, len(starts), size)
    for cut in rng.permutation(cuts):
        chosen = by_length[cut : cut + size]
        yield starts[chosen], ends[chosen]
