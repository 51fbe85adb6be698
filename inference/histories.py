"""Histories of a batch of users as an encoder asks for them: whole, or one event of each.

They come packed from the stream and as tensors from clients of the graphs. Of either, `keys` are bytes that
are equal where histories are, and of which one begins with another where it has grown out of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from features.encoding import HistoryArrays, encode_events, encode_histories
from features.encoding import Rows as RowLookup
from features.sequence import SequenceBatch, newest_events
from inference.types import RankRequest, Tensors

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

COLUMNS: Final = ("items", "categories", "behaviors", "gaps")
# By so many of its first events a history that names no user is found again.
_NAMING_EVENTS: Final = 8


class Histories(Protocol):
    """Of some users, in order. `lengths` [users] are events."""

    lengths: Int64

    def users(self) -> Sequence[Hashable]:
        """By what each is found again."""
        ...

    def keys(self) -> list[bytes]: ...

    def arrays(self, longest: int) -> HistoryArrays:
        """The newest events of each, in so many slots."""
        ...

    def of(self, users: Int64) -> Histories:
        """Some of the users, in ascending order."""
        ...

    def events(self, users: Int64, places: Int64) -> dict[str, Int32]:
        """One event of each of some users, none of them a first: its columns [users] as in `arrays`."""
        ...


class Packed:
    """Behaviour sequences, with who asks."""

    def __init__(
        self, requests: Sequence[RankRequest], histories: SequenceBatch, vocabulary: RowLookup
    ) -> None:
        """`histories` are the newest events of the requests' sequences, unpacked."""
        self._requests = requests
        self._histories = histories
        self._vocabulary = vocabulary
        self.lengths = histories.lengths

    def users(self) -> list[int]:
        return [request.user_id for request in self._requests]

    def keys(self) -> list[bytes]:
        return [
            newest_events(request.sequence or b"", length)
            for request, length in zip(self._requests, self.lengths.tolist(), strict=True)
        ]

    def arrays(self, longest: int) -> HistoryArrays:
        return encode_histories(self._histories, self._vocabulary, longest)

    def of(self, users: Int64) -> Packed:
        requests = [self._requests[user] for user in users.tolist()]
        return Packed(requests, self._histories.of(users), self._vocabulary)

    def events(self, users: Int64, places: Int64) -> dict[str, Int32]:
        starts = np.cumsum(self.lengths) - self.lengths
        return encode_events(self._histories, starts[users] + places, self._vocabulary)


class Sent:
    """The inputs of a graph, as a client sent them; who is found again by how a history begins."""

    def __init__(self, inputs: Tensors) -> None:
        """`inputs` hold the columns [users, slots] and `lengths` [users], of at most so many slots."""
        self._columns = np.stack([inputs[name] for name in COLUMNS], axis=2)
        self.lengths = inputs["lengths"].astype(np.int64)

    def users(self) -> list[bytes]:
        return [events[:_NAMING_EVENTS].tobytes() for events in self._columns]

    def keys(self) -> list[bytes]:
        """Empty, so that nothing is kept, where a history is so short that others may begin as it does."""
        return [
            events[:length].tobytes() if length >= _NAMING_EVENTS else b""
            for events, length in zip(self._columns, self.lengths.tolist(), strict=True)
        ]

    def arrays(self, longest: int) -> HistoryArrays:
        items, categories, behaviors, gaps = (
            np.ascontiguousarray(self._columns[:, :longest, place]) for place in range(len(COLUMNS))
        )
        return HistoryArrays(items, categories, behaviors, gaps, self.lengths.astype(np.int32))

    def of(self, users: Int64) -> Sent:
        some = object.__new__(Sent)
        some._columns, some.lengths = self._columns[users], self.lengths[users]
        return some

    def events(self, users: Int64, places: Int64) -> dict[str, Int32]:
        found = self._columns[users, places]
        return {name: found[:, place] for place, name in enumerate(COLUMNS)}
