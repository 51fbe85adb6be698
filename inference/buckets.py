"""The shapes engines are warmed with, and how a batch is cut and padded into them.

Histories of very different length do not share a shape: padding one click to a hundred slots costs
more than one more call. What a shape costs is measured while it is warmed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from inference.engines.base import Shape

HISTORIES: Final = (4, 10, 25, 50, 100)
CANDIDATES: Final = (50, 200)
BATCHES: Final = (1, 2, 4, 8, 16, 32)

# What cutting, padding and putting together again cost beside the engine. It also keeps the noise of
# a short measurement from cutting a batch for nothing.
_PER_CUT_S: Final = 150e-6

# What one appended event costs beside the engine.
_PER_APPEND_S: Final = 50e-6
# More new events than this are encoded with their history.
MOST_APPENDED: Final = 4

# What happens to a history before its candidates are scored: nothing, where it is known; and "rank" is
# encoding and scoring in one.
Work = Literal["encode", "append", "score", "rank"]

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Cut:
    """Users that go through an engine together: positions in the batch, and the shape they are padded to."""

    users: Int64
    batch: int
    history: int

    def among(self, users: Int64) -> Cut:
        """The same, where its users are positions among these users of the batch."""
        return Cut(users[self.users], self.batch, self.history)


@dataclass(slots=True)
class Buckets:
    """Warmed sizes, ascending. `cost_s` holds what each shape took when warmed; empty before that."""

    histories: tuple[int, ...] = HISTORIES
    candidates: tuple[int, ...] = CANDIDATES
    batches: tuple[int, ...] = BATCHES
    cost_s: Mapping[Shape, float] = field(default_factory=dict)
    _plans: dict[tuple[Work, tuple[int, ...]], tuple[int, ...]] = field(default_factory=dict, repr=False)
    _splits: dict[tuple[Work, int, int], tuple[float, tuple[int, ...]]] = field(
        default_factory=dict, repr=False
    )
    _alone: dict[tuple[Work, int], Cut] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name, sizes in (
            ("histories", self.histories),
            ("candidates", self.candidates),
            ("batches", self.batches),
        ):
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise ValueError(f"{name} must ascend from at least 1, not {sizes}")

    def up_to(self, max_history: int) -> Buckets:
        """The same without histories longer than a model takes, and with one of exactly that length."""
        shorter = tuple(size for size in self.histories if size < max_history)
        return Buckets((*shorter, max_history), self.candidates, self.batches)

    def with_costs(self, cost_s: Mapping[Shape, float]) -> Buckets:
        """The same, cutting batches by what its shapes were measured to cost."""
        return Buckets(self.histories, self.candidates, self.batches, cost_s)

    def shapes(self, *, append: bool = False, rank: bool = False) -> Iterator[Shape]:
        """Everything that may reach an engine; appended events where there is a cache and a graph, and both
        halves in one where there is none."""
        for batch in self.batches:
            for history in self.histories:
                yield Shape("encode", batch, history, 0)
                if append:
                    yield Shape("append", batch, history, 0)
                for candidates in self.candidates:
                    yield Shape("score", batch, history, candidates)
                    if rank:
                        yield Shape("rank", batch, history, candidates)

    def a_few(self, *, append: bool = False, rank: bool = False) -> Iterator[Shape]:
        """Of these the smallest batches."""
        return Buckets(self.histories, self.candidates, self.batches[:1]).shapes(append=append, rank=rank)

    def cuts(self, lengths: npt.NDArray[np.integer[Any]], work: Work = "encode") -> list[Cut]:
        """Every user in one cut, shortest histories first, at the least measured cost."""
        if len(lengths) == 1:
            # Half of a busy worker's batches, and there are few lengths.
            length = min(int(lengths[0]), self.histories[-1])
            known = self._alone.get((work, length))
            if known is None:
                (known,) = self._cuts(lengths, work)
                known.users.flags.writeable = False
                self._alone[work, length] = known
            return [known]
        return self._cuts(lengths, work)

    def _cuts(self, lengths: npt.NDArray[np.integer[Any]], work: Work) -> list[Cut]:
        order = np.argsort(lengths, kind="stable")
        ends = np.searchsorted(lengths[order], self.histories, side="right")
        ends[-1] = len(lengths)  # longer than the largest: its newest events are kept
        cuts: list[Cut] = []
        start = 0
        for history, end in zip(self.histories, self._merged(tuple(ends.tolist()), work), strict=True):
            for batch in self._split(end - start, history, work)[1]:
                users = order[start : min(end, start + batch)]
                cuts.append(Cut(users, batch, history))
                start += len(users)
        return cuts

    def appends_pay(self, lengths: Int64, new: Int64) -> Bool:
        """For which users it takes less time to append so many events than to encode the whole history,
        by measure; for nobody where appending was not warmed."""
        batch = fit(self.batches, len(lengths))
        most = np.array([self._most_appended(batch, history) for history in self.histories])
        bucket = np.minimum(np.searchsorted(self.histories, lengths), len(most) - 1)
        return np.asarray(new <= most[bucket])

    def _most_appended(self, batch: int, history: int) -> int:
        encode = self.cost_s.get(Shape("encode", batch, history, 0))
        append = self.cost_s.get(Shape("append", batch, history, 0))
        if encode is None or append is None:
            return 0
        return min(MOST_APPENDED, int(encode / (append + _PER_APPEND_S)))

    def _merged(self, ends: tuple[int, ...], work: Work) -> tuple[int, ...]:
        """Where the users of each history bucket end, once buckets that gain nothing have been emptied."""
        plan = self._plans.get((work, ends))
        if plan is None:
            if len(self._plans) >= 10_000:
                self._plans.clear()
            plan = self._plans[work, ends] = self._best(ends, work)
        return plan

    def _best(self, ends: tuple[int, ...], work: Work) -> tuple[int, ...]:
        """Bucket by bucket, what all up to it cost at least if it is not emptied."""
        starts = (0, *ends)
        least, after = [0.0], [0]  # and after which bucket that leaves the others empty
        for bucket, history in enumerate(self.histories):
            costs = [
                least[other] + self._split(ends[bucket] - starts[other], history, work)[0]
                for other in range(bucket + 1)
            ]
            after.append(min(range(bucket + 1), key=costs.__getitem__))
            least.append(costs[after[-1]])
        plan, bucket = list(ends), len(ends)
        while bucket:
            other = after[bucket]
            plan[other : bucket - 1] = [starts[other]] * (bucket - 1 - other)
            bucket = other
        return tuple(plan)

    def _split(self, users: int, history: int, work: Work) -> tuple[float, tuple[int, ...]]:
        """The cheapest warmed batch sizes that hold so many users, and their cost."""
        if not users:
            return 0.0, ()
        known = self._splits.get((work, users, history))
        if known is None:
            splits = []
            for batch in self.batches:
                cost_s, rest = self._split(max(0, users - batch), history, work)
                splits.append((self.cost(batch, history, work) + cost_s, (batch, *rest)))
            known = self._splits[work, users, history] = min(splits)
        return known

    def cost(self, batch: int, history: int, work: Work = "encode") -> float:
        """Seconds of one cut, scoring included; before warming, a guess in the right order."""
        if work == "rank":
            at_once = self.cost_s.get(Shape("rank", batch, history, self.candidates[0]))
            return self.cost(batch, history) if at_once is None else at_once + _PER_CUT_S
        score = self.cost_s.get(Shape("score", batch, history, self.candidates[0]))
        before = 0.0 if work == "score" else self.cost_s.get(Shape(work, batch, history, 0))
        if score is None or before is None:
            return _PER_CUT_S + 2e-6 * batch * (history + self.candidates[0])
        return before + score + _PER_CUT_S


def fit(sizes: Sequence[int], needed: int) -> int:
    """The smallest size that holds what is needed, or the largest there is."""
    return sizes[min(bisect_left(sizes, needed), len(sizes) - 1)]


def pad_rows(array: npt.NDArray[Scalar], rows: int) -> npt.NDArray[Scalar]:
    """C-contiguous, with rows of zeros appended."""
    if len(array) == rows:
        return np.ascontiguousarray(array)
    padded = np.zeros((rows, *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    return padded
