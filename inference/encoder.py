"""Histories to what candidates are scored with, by the least work that gives it.

A history that the cache has whole is copied, one that has grown by a few events is copied and appended
to where that is measured to be faster, and any other is encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compression.registry import ModelShape
from features.encoding import HistoryArrays, Vocabulary, encode_events, encode_histories
from features.sequence import SequenceBatch, newest_events
from inference import metrics
from inference.buckets import MOST_APPENDED, Buckets, Cut, Work, fit, pad_rows
from inference.derived import Derived
from inference.engines.base import Engine, Precision
from inference.types import RankRequest, Tensors
from inference.user_cache import Found, UserCache

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A batch, ready for candidates: by cut `keys`, `values`, `user_vector` and `lengths` as the score graph
    reads them; and what else is known of the users, their vectors at least.

    `news` [users] says of whom the cache has not all of it. `histories` are as the cache compares them; none
    where none is asked.
    """

    cuts: list[tuple[Cut, Tensors]]
    derived: Derived
    news: Bool
    histories: list[bytes]
    precision: Precision


class Encoder:
    """For one released version. Safe to call from several threads."""

    def __init__(
        self, vocabulary: Vocabulary, model: ModelShape, retrieved: int, cache: UserCache | None = None
    ) -> None:
        """`retrieved`: how many items are retrieved for a user."""
        self._vocabulary = vocabulary
        self._model = model
        self._retrieved = retrieved
        self._cache = cache

    def encode(
        self, engine: Engine, buckets: Buckets, requests: Sequence[RankRequest], histories: SequenceBatch
    ) -> Encoded:
        """`histories` are those of the requests, unpacked."""
        users, cache, longest = len(requests), self._cache, self._model.max_history
        if not getattr(engine, "keeps_states", True):
            cache = None
        encoded = Encoded(
            cuts=[],
            derived=Derived.nothing(
                users, self._model.dim, self._retrieved, 0 if cache is None else cache.listed
            ),
            news=np.zeros(users, np.bool_),
            histories=[] if cache is None else [newest_events(ask.sequence, longest) for ask in requests],
            precision=engine.precision,
        )
        if cache is None:
            self._encode(engine, buckets, histories, np.arange(users), encoded)
        else:
            self._find_or_encode(cache, engine, buckets, requests, histories, encoded)
        return encoded

    def keep(self, encoded: Encoded, requests: Sequence[RankRequest], sound: Bool) -> None:
        """Let the cache have what it has not, of users whose numbers were sound [users]."""
        if self._cache is None or not encoded.histories:
            return
        wanted = encoded.news & sound
        if not wanted.any():
            return
        for cut, states in encoded.cuts:
            rows = np.flatnonzero(wanted[cut.users]).tolist()
            users = cut.users[rows].tolist()
            self._cache.keep(
                [requests[user].user_id for user in users],
                [encoded.histories[user] for user in users],
                states,
                rows,
                encoded.derived,
                users,
                encoded.precision,
            )

    def _find_or_encode(
        self,
        cache: UserCache,
        engine: Engine,
        buckets: Buckets,
        requests: Sequence[RankRequest],
        histories: SequenceBatch,
        encoded: Encoded,
    ) -> None:
        lengths, derived = histories.lengths, encoded.derived
        users = [request.user_id for request in requests]
        with cache.find(users, encoded.histories, engine.precision) as found:
            same, grown, rest = _parts(buckets, lengths, found)
            hits = _copy(cache, buckets, lengths, found, same, "score")
            appends = _copy(cache, buckets, lengths, found, grown, "append")
            derived.put(same, cache.derived(found.slots[same]))
        for cut, states in hits:
            states["user_vector"] = pad_rows(derived.vectors[cut.users], cut.batch)
            encoded.cuts.append((cut, states))
        if appends:
            self._append(engine, histories, found, appends, encoded)
        if len(rest):
            self._encode(engine, buckets, histories, rest, encoded)
        encoded.news[:] = ~found.same
        for outcome, some in (("hit", same), ("append", grown), ("miss", rest[lengths[rest] > 0])):
            if len(some):
                metrics.cache_users(outcome).inc(len(some))

    def _append(
        self,
        engine: Engine,
        histories: SequenceBatch,
        found: Found,
        cuts: list[tuple[Cut, Tensors]],
        encoded: Encoded,
    ) -> None:
        """The new events of some users, one after the other, to copies of what was known."""
        ends = np.cumsum(histories.lengths)
        for cut, states in cuts:
            known = found.known[cut.users]
            new = histories.lengths[cut.users] - known
            vectors = np.zeros((cut.batch, self._model.dim), np.float32)
            for step in range(int(new.max())):
                rows = np.flatnonzero(new > step)
                at = (ends[cut.users] - new)[rows] + step
                place = known[rows] + step
                events = encode_events(histories, at, self._vocabulary)
                inputs = {
                    name: _scattered(column[:, None], rows, cut.batch) for name, column in events.items()
                }
                inputs["lengths"] = _scattered(place.astype(np.int32), rows, cut.batch)
                inputs |= {name: states[name] for name in ("keys", "values")}
                outputs = engine.run("append", inputs)
                vectors[rows] = outputs["user_vector"][rows]
                for name, added in (("keys", "new_key"), ("values", "new_value")):
                    states[name][rows, :, :, place] = outputs[added][rows, :, :, 0]
            encoded.derived.vectors[cut.users] = vectors[: len(cut.users)]
            states["user_vector"] = vectors
            encoded.cuts.append((cut, states))

    def _encode(
        self, engine: Engine, buckets: Buckets, histories: SequenceBatch, users: Int64, encoded: Encoded
    ) -> None:
        """Whole histories of some users, or of all."""
        if len(users) < len(histories):
            histories = histories.of(users)
        longest = fit(buckets.histories, int(histories.lengths.max(initial=0)))
        arrays = encode_histories(histories, self._vocabulary, longest)
        for cut in buckets.cuts(histories.lengths):
            inputs = _cut_out(arrays, cut)
            outputs = engine.run("encode", inputs)
            encoded.derived.vectors[users[cut.users]] = outputs["user_vector"][: len(cut.users)]
            encoded.cuts.append((cut.among(users), {**outputs, "lengths": inputs["lengths"]}))


def _parts(buckets: Buckets, lengths: Int64, found: Found) -> tuple[Int64, Int64, Int64]:
    """The users whose histories are known whole, those to append to, and those to encode."""
    new = lengths - found.known
    grown = (found.known > 0) & ~found.same & (new <= MOST_APPENDED)
    if grown.any():
        grown[grown] = buckets.appends_pay(lengths[grown], new[grown])
    return np.flatnonzero(found.same), np.flatnonzero(grown), np.flatnonzero(~found.same & ~grown)


def _copy(
    cache: UserCache, buckets: Buckets, lengths: Int64, found: Found, users: Int64, work: Work
) -> list[tuple[Cut, Tensors]]:
    """Known states of some users, by cut."""
    copies: list[tuple[Cut, Tensors]] = []
    if not len(users):
        return copies
    for cut in (cut.among(users) for cut in buckets.cuts(lengths[users], work)):
        states = cache.states(found.slots[cut.users], cut.batch, cut.history)
        states["lengths"] = pad_rows(lengths[cut.users].astype(np.int32), cut.batch)
        copies.append((cut, states))
    return copies


def _scattered(values: Int32, rows: Int64, batch: int) -> Int32:
    """Values at some rows of a cut, padding at the others."""
    padded = np.zeros((batch, *values.shape[1:]), np.int32)
    padded[rows] = values
    return padded


def _cut_out(arrays: HistoryArrays, cut: Cut) -> Tensors:
    """The users of a cut, padded to its shape. Shorter histories have only padding beyond the cut."""
    if len(arrays) == cut.batch == 1:
        return {name: array[..., : cut.history] for name, array in arrays.tensors().items()}
    return {
        name: pad_rows(array[cut.users] if array.ndim == 1 else array[cut.users, : cut.history], cut.batch)
        for name, array in arrays.tensors().items()
    }
