"""Histories to what candidates are scored with, by the least work that gives it.

A history that the cache has whole is copied once candidates need it, one that has grown by a few events is
copied and appended to where that is measured to be faster, and any other is encoded. Where a model scores
by user vectors alone, these go through the engine in as few cuts as hold them, known or computed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compression.releases.registry import ModelShape
from features.encoding import HistoryArrays
from inference import metrics
from inference.buckets import MOST_APPENDED, Buckets, Cut, Work, fit, pad_rows
from inference.derived import Derived
from inference.engines.base import Engine, Precision, inputs_of
from inference.histories import Histories
from inference.types import Graph, Tensors
from inference.user_cache import Computed, Found, UserCache

Bool = npt.NDArray[np.bool_]
Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A batch, ready for candidates: by cut the states, `user_vector` and `lengths` of what was
    computed or looked up; and what else is known of the users, their vectors at least.

    `pending` [users] are in no cut yet: the cache has them, and perhaps their states are not needed.
    `news` [users] says of whom the cache has not all there is. `keys` are the histories as the cache compares
    them; none where none is asked.
    """

    histories: Histories
    precision: Precision
    derived: Derived
    cuts: list[tuple[Cut, Tensors]]
    pending: Bool
    news: Bool
    keys: list[bytes]

    def named(self, users: list[int]) -> tuple[list[Hashable], list[bytes], list[int]]:
        """How the cache is told of some: by what they are found, their histories, and how many events."""
        names, lengths = self.histories.users(), self.histories.lengths.tolist()
        return (
            [names[user] for user in users],
            [self.keys[user] for user in users],
            [lengths[user] for user in users],
        )


class Encoder:
    """For one released version. Safe to call from several threads."""

    def __init__(self, model: ModelShape, retrieved: int, cache: UserCache | None = None) -> None:
        """`retrieved`: how many items are retrieved for a user."""
        self._model = model
        self._retrieved = retrieved
        self._cache = cache

    def encode(self, engine: Engine, buckets: Buckets, histories: Histories) -> Encoded:
        cache = self._cache if _keeps_states(engine) else None
        if cache is None:
            encoded = self._nothing_known(engine, histories, [], 0)
            self._encode(engine, buckets, encoded, np.arange(len(histories.lengths)))
            return encoded
        return self._find_or_encode(cache, engine, buckets, histories, histories.keys())

    def _nothing_known(self, engine: Engine, histories: Histories, keys: list[bytes], listed: int) -> Encoded:
        users = len(histories.lengths)
        return Encoded(
            histories=histories,
            precision=engine.precision,
            derived=Derived.nothing(users, self._model.dim, self._retrieved, listed),
            cuts=[],
            pending=np.zeros(users, np.bool_),
            news=np.ones(users, np.bool_),
            keys=keys,
        )

    @staticmethod
    def inputs(buckets: Buckets, histories: Histories, work: Work) -> Iterator[tuple[Cut, Tensors]]:
        """Histories as an engine reads them, by cut, as they cost least for this work."""
        arrays = histories.arrays(fit(buckets.histories, int(histories.lengths.max(initial=0))))
        for cut in buckets.cuts(histories.lengths, work):
            yield cut, _cut_out(arrays, cut)

    @contextmanager
    def completed(
        self, engine: Engine, buckets: Buckets, encoded: Encoded, needed: Bool
    ) -> Iterator[list[tuple[Cut, Tensors]]]:
        """Cuts with the needed [users] in them as the score graph reads them, until the block ends; encoded
        anew where the cache has lost them meanwhile. What it has not lost it lends: those states leave with
        the block."""
        if self._model.scores_by_vector:
            yield _vectors(buckets, encoded, needed.nonzero()[0])
            return
        users = (encoded.pending & needed).nonzero()[0]
        if self._cache is None or not len(users):
            yield encoded.cuts
            return
        encoded.pending[users] = False
        with self._cache.find(*encoded.named(users.tolist()), encoded.precision) as found:
            lost = [row for row, whole in enumerate(found.same) if not whole]
            known = np.arange(len(users)) if not lost else np.flatnonzero(found.same)
            lent = _known(self._cache, buckets, encoded, found, known, "score", users, lend=True)
            for cut, states in lent:
                states["user_vector"] = pad_rows(encoded.derived.vectors[cut.users], cut.batch)
                encoded.cuts.append((cut, states))
            if lost:
                self._encode(engine, buckets, encoded, users[lost])
            yield encoded.cuts
            for _, states in lent:
                for name in self._model.state_names:
                    del states[name]

    def keep(self, encoded: Encoded, sound: Bool) -> None:
        """Let the cache have what it has not, of users whose numbers were sound [users]."""
        wanted = encoded.news & sound
        if self._cache is None or not encoded.keys or not wanted.any():
            return
        users, place = wanted.nonzero()[0].tolist(), wanted.cumsum() - 1
        computed: list[Computed] = []
        for cut, states in encoded.cuts:
            if states.keys() >= set(self._model.state_names):  # and not lent by the cache
                rows = wanted[cut.users].nonzero()[0]
                computed.append(Computed(place[cut.users[rows]].tolist(), rows.tolist(), states))
        self._cache.keep(*encoded.named(users), computed, encoded.derived, users, encoded.precision)

    def _find_or_encode(
        self,
        cache: UserCache,
        engine: Engine,
        buckets: Buckets,
        histories: Histories,
        keys: list[bytes],
    ) -> Encoded:
        users = len(keys)
        with cache.find(histories.users(), keys, histories.lengths.tolist(), engine.precision) as found:
            if users and all(found.same):
                metrics.cache_users("hit").inc(users)
                return Encoded(
                    histories=histories,
                    precision=engine.precision,
                    derived=cache.derived.of(found.slots),
                    cuts=[],
                    pending=np.ones(users, np.bool_),
                    news=np.zeros(users, np.bool_),
                    keys=keys,
                )
            encoded = self._nothing_known(engine, histories, keys, cache.listed)
            same, grown, rest = _parts(buckets, histories.lengths, found)
            appends = _known(cache, buckets, encoded, found, grown, "append", np.arange(users))
            if len(same):
                encoded.derived.put(same, cache.derived, [found.slots[user] for user in same])
                encoded.pending[same] = True
                encoded.news[same] = False
        if appends:
            self._append(engine, encoded, np.array(found.known), appends)
        if len(rest):
            self._encode(engine, buckets, encoded, rest)
        misses = sum(1 for user in rest if keys[user])
        for outcome, count in (("hit", len(same)), ("append", len(grown)), ("miss", misses)):
            if count:
                metrics.cache_users(outcome).inc(count)
        return encoded

    def _append(
        self, engine: Engine, encoded: Encoded, known_events: Int64, cuts: list[tuple[Cut, Tensors]]
    ) -> None:
        """The new events of some users, one after the other, to copies of what was known."""
        histories = encoded.histories
        for cut, states in cuts:
            known = known_events[cut.users]
            new = histories.lengths[cut.users] - known
            vectors = np.zeros((cut.batch, self._model.dim), np.float32)
            for step in range(int(new.max())):
                rows = np.flatnonzero(new > step)
                place = known[rows] + step
                events = histories.events(cut.users[rows], place)
                inputs = {
                    name: _scattered(column[:, None], rows, cut.batch) for name, column in events.items()
                }
                inputs["lengths"] = _scattered(place.astype(np.int32), rows, cut.batch)
                inputs |= {name: states[name] for name in self._model.state_names}
                outputs = engine.run("append", inputs)
                vectors[rows] = outputs["user_vector"][rows]
                for name, added in zip(self._model.state_names, self._model.new_state_names, strict=True):
                    states[name][rows, place] = outputs[added][rows, 0]
            encoded.derived.vectors[cut.users] = vectors[: len(cut.users)]
            states["user_vector"] = vectors
            encoded.cuts.append((cut, states))

    def _encode(self, engine: Engine, buckets: Buckets, encoded: Encoded, users: Int64) -> None:
        """Whole histories of some users, or of all."""
        histories = encoded.histories
        if len(users) < len(histories.lengths):
            histories = histories.of(users)
        for cut, inputs in self.inputs(buckets, histories, "encode"):
            states = states_of(engine, inputs)
            encoded.derived.vectors[users[cut.users]] = states["user_vector"][: len(cut.users)]
            encoded.cuts.append((cut.among(users), states))


def _keeps_states(engine: Engine) -> bool:
    """Whether what candidates are scored with comes back from this engine: a vector always does."""
    return engine.keeps_states or engine.model.scores_by_vector


def scoring(engine: Engine) -> Graph:
    """The graph that scores on this engine: where states are too heavy to bring back, the one that
    takes histories as they are and encodes them again."""
    return "score" if _keeps_states(engine) else "rank"


def states_of(engine: Engine, inputs: Tensors) -> Tensors:
    """Histories encoded: their user vectors, and what `scores_of` needs of them."""
    if engine.keeps_states or not engine.model.state_names:
        return {**engine.run("encode", inputs), "lengths": inputs["lengths"]}
    return {**inputs, **engine.run_for("encode", inputs, ("user_vector",))}


def scores_of(engine: Engine, states: Tensors, asked: Tensors) -> Float32:
    """Scores of the candidates asked for after encoded histories."""
    graph = scoring(engine)
    names = inputs_of(graph, engine.model)
    inputs = {name: array for name, array in {**states, **asked}.items() if name in names}
    scores: Float32 = engine.run(graph, inputs)["scores"]
    return scores


def _vectors(buckets: Buckets, encoded: Encoded, users: Int64) -> list[tuple[Cut, Tensors]]:
    """The vectors of some users by cut, however long their histories."""
    cuts: list[tuple[Cut, Tensors]] = []
    for start in range(0, len(users), buckets.batches[-1]):
        some = users[start : start + buckets.batches[-1]]
        batch = fit(buckets.batches, len(some))
        lengths = encoded.histories.lengths[some].astype(np.int32)
        states = {
            "user_vector": pad_rows(encoded.derived.vectors[some], batch),
            "lengths": pad_rows(lengths, batch),
        }
        cuts.append((Cut(some, batch, buckets.histories[0]), states))
    return cuts


def _parts(buckets: Buckets, lengths: Int64, found: Found) -> tuple[Int64, Int64, Int64]:
    """The users whose histories are known whole, those to append to, and those to encode."""
    same, grown, rest = [], [], []
    for user, (length, known, whole) in enumerate(
        zip(lengths.tolist(), found.known, found.same, strict=True)
    ):
        if whole:
            same.append(user)
        elif known and length - known <= MOST_APPENDED:
            grown.append(user)
        else:
            rest.append(user)
    if grown:
        some = np.array(grown)
        pays = buckets.appends_pay(lengths[some], lengths[some] - np.array(found.known)[some])
        rest = sorted(rest + some[~pays].tolist())
        grown = some[pays].tolist()
    return np.array(same, np.int64), np.array(grown, np.int64), np.array(rest, np.int64)


def _known(
    cache: UserCache,
    buckets: Buckets,
    encoded: Encoded,
    found: Found,
    chosen: Int64,
    work: Work,
    users: Int64,
    *,
    lend: bool = False,
) -> list[tuple[Cut, Tensors]]:
    """Known states, copied or lent by the cache, by cut, of those chosen among the users that were looked
    for."""
    known: list[tuple[Cut, Tensors]] = []
    if not len(chosen):
        return known
    lengths = encoded.histories.lengths[users]
    for cut in (cut.among(chosen) for cut in buckets.cuts(lengths[chosen], work)):
        slots = [found.slots[user] for user in cut.users]
        states = cache.states(slots, cut.batch, cut.history, lend=lend)
        states["lengths"] = pad_rows(lengths[cut.users].astype(np.int32), cut.batch)
        known.append((cut.among(users), states))
    return known


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
