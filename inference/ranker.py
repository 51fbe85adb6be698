"""THE PAGE TO READ: packed sequences in, ranked lists out.

    unpack → encode → retrieve → candidates → score → select

One released version is one ranker: vocabulary, item table, retrieval index and engines were published
together and are opened together, so versions cannot mix. `rank` is synchronous and vectorised; a
batcher calls it in a thread.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from compression.registry import Artefact, ArtefactInvalid, Registry
from features.candidates import SOURCES, Candidates, find_candidates
from features.encoding import HistoryArrays, Vocabulary, encode_histories
from features.sequence import SequenceBatch, unpack
from features.settings import FeatureSettings
from features.statistics import ItemStatistics
from inference import engines, metrics
from inference.buckets import Buckets, Cut, fit, pad_rows
from inference.engines.base import Engine, Shape
from inference.errors import EngineFailed, InferenceError, ModelUnavailable
from inference.lookup import ItemLookup
from inference.retrieval import RetrievalIndex
from inference.settings import InferenceSettings
from inference.types import Graph, RankedList, RankRequest, Tensors

_GRAPHS: Final[tuple[Graph, ...]] = ("encode", "score")

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Encoded = list[tuple[Cut, Tensors]]


class Ranker:
    """A released version, warmed. Safe to call from as many threads as it has engines."""

    def __init__(
        self,
        version: str,
        vocabulary: Vocabulary,
        index: RetrievalIndex,
        pool: Sequence[Engine],
        buckets: Buckets,
        *,
        retrieved: int,
        features: FeatureSettings,
    ) -> None:
        self.version = version
        self.engine = pool[0].name
        self.precision = pool[0].precision
        self.buckets = buckets
        self._vocabulary = vocabulary
        self._lookup = ItemLookup(vocabulary)
        self._index = index
        self._engines = list(pool)
        self._free: queue.SimpleQueue[Engine] = queue.SimpleQueue()
        for engine in pool:
            self._free.put(engine)
        self._retrieved = retrieved
        self._features = features
        self._model = pool[0].model

    @classmethod
    def open(
        cls,
        registry_root: str | Path,
        alias: str = "serving",
        *,
        settings: InferenceSettings | None = None,
        features: FeatureSettings | None = None,
    ) -> Ranker:
        """Verify, load, index, warm every bucket and check what comes out; then it is ready.

        Raises `ModelUnavailable` with the reason. Takes seconds: not for the event loop's thread.
        """
        settings = settings or InferenceSettings()
        try:
            artefact = Registry(registry_root).open(alias)
            vocabulary, table = artefact.vocabulary(), artefact.item_table()
        except ArtefactInvalid as error:
            raise ModelUnavailable(str(error)) from error
        known = len(vocabulary.item_ids)
        index = RetrievalIndex(
            vocabulary.item_ids,
            table[1 : 1 + known],
            exact_until=settings.exact_until,
            probes=settings.probes,
        )
        buckets = settings.buckets().up_to(artefact.manifest.model.max_history)
        pool = [_warmed(artefact, buckets, settings) for _ in range(settings.runners)]
        ranker = cls(
            artefact.version,
            vocabulary,
            index,
            [engine for engine, _ in pool],
            buckets.with_costs(pool[0][1]),
            retrieved=settings.retrieved,
            features=features or FeatureSettings(),
        )
        ranker._check(table)
        return ranker

    def rank(
        self, requests: Sequence[RankRequest], statistics: ItemStatistics
    ) -> list[RankedList | InferenceError]:
        """One answer per request, in order. What an engine fails at raises `EngineFailed`."""
        engine = self._free.get()
        try:
            return self._rank(engine, requests, statistics)
        finally:
            self._free.put(engine)

    def close(self) -> None:
        """Free the model. Nothing may be ranking."""
        for engine in self._engines:
            engine.close()

    def _rank(
        self, engine: Engine, requests: Sequence[RankRequest], statistics: ItemStatistics
    ) -> list[RankedList | InferenceError]:
        clock = _Stages()
        histories = unpack([request.sequence for request in requests], last=self._model.max_history)
        clock.lap("unpack")
        encoded, user_vectors = self._encode(engine, histories)
        clock.lap("encode")
        retrieved = self._retrieve(requests, histories, user_vectors, statistics)
        clock.lap("retrieve")
        candidates = find_candidates(
            histories,
            statistics,
            retrieved=retrieved,
            exclude=[request.exclude for request in requests],
            explicit=[request.candidates for request in requests],
            category_of=self._lookup.capped_categories,
            settings=self._features,
        )
        clock.lap("candidates")
        scores = self._score(engine, encoded, candidates)
        clock.lap("score")
        return self._select(requests, candidates, scores, user_vectors, clock)

    def _encode(self, engine: Engine, histories: SequenceBatch) -> tuple[Encoded, Float32]:
        """What the engine made of every history, by cut; and the user vectors [users, dim]."""
        users = len(histories)
        longest = fit(self.buckets.histories, int(histories.lengths.max(initial=0)))
        arrays = encode_histories(histories, self._vocabulary, longest)
        user_vectors = np.empty((users, self._model.dim), np.float32)
        encoded: Encoded = []
        for cut in self.buckets.cuts(histories.lengths):
            inputs = _cut_out(arrays, cut)
            outputs = engine.run("encode", inputs)
            user_vectors[cut.users] = outputs["user_vector"][: len(cut.users)]
            encoded.append((cut, {**outputs, "lengths": inputs["lengths"]}))
        return encoded, user_vectors

    def _retrieve(
        self,
        requests: Sequence[RankRequest],
        histories: SequenceBatch,
        user_vectors: Float32,
        statistics: ItemStatistics,
    ) -> tuple[Int64, Float32] | None:
        """Ids and scores [users, n]; -1 for users who bring candidates, or whom popularity serves."""
        asks = np.fromiter((request.candidates is None for request in requests), np.bool_, len(requests))
        if len(statistics.popular()):
            asks &= histories.lengths > 0
        asks &= np.isfinite(user_vectors).all(axis=1)
        if not asks.any():
            return None
        if asks.all():
            return self._index.search(user_vectors, self._retrieved)
        found, scores = self._index.search(user_vectors[asks], self._retrieved)
        ids = np.full((len(requests), found.shape[1]), -1, np.int64)
        ids[asks] = found
        similarity = np.zeros(ids.shape, np.float32)
        similarity[asks] = scores
        return ids, similarity

    def _score(self, engine: Engine, encoded: Encoded, candidates: Candidates) -> Float32:
        """Scores [users, width]; minus infinity where there is no candidate."""
        items, counts = candidates.items, candidates.counts
        rows = self._lookup.rows(items)
        scores = np.full(items.shape, -np.inf, np.float32)
        for cut, states in encoded:
            column = 0
            places = np.flatnonzero(counts[cut.users])
            while len(places):
                users = cut.users[places]
                # A width that every one of them fills; who has more candidates goes on to the next.
                width = fit(self.buckets.candidates, int(counts[users].min()) - column)
                columns = slice(column, column + width)
                inputs = _at_places(states, places, cut, self.buckets)
                batch = len(inputs["lengths"])
                asked = _padded(rows[users, columns], batch, width)
                inputs["candidates"] = asked
                inputs["candidate_categories"] = self._lookup.categories_of_rows(asked)
                answer = engine.run("score", inputs)["scores"]
                filled = min(width, items.shape[1] - column)
                scores[users, columns] = answer[: len(users), :filled]
                column += width
                places = places[counts[users] > column]
        if len(counts) and counts.min() < items.shape[1]:
            scores[np.arange(items.shape[1]) >= counts[:, None]] = -np.inf
        return scores

    def _select(
        self,
        requests: Sequence[RankRequest],
        candidates: Candidates,
        scores: Float32,
        user_vectors: Float32,
        clock: _Stages,
    ) -> list[RankedList | InferenceError]:
        """The k best of each; equal scores keep the order of the candidates."""
        most = max((request.k for request in requests), default=0)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :most]
        places = best + np.arange(len(best))[:, None] * scores.shape[1]
        items = candidates.items.take(places).tolist()
        sources = candidates.sources.take(places).tolist()
        values = scores.take(places).tolist()
        # Minus infinity is ours beyond the count, and the engine's before it.
        wrong = np.isfinite(scores).sum(axis=1) != candidates.counts
        wrong |= ~np.isfinite(user_vectors).all(axis=1)
        timings_ms = clock.finish("select")
        answers: list[RankedList | InferenceError] = []
        for row, (request, count, bad) in enumerate(
            zip(requests, candidates.counts.tolist(), wrong.tolist(), strict=True)
        ):
            if bad:
                answers.append(EngineFailed(f"{self.engine}: numbers that are not finite"))
                continue
            size = min(request.k, count)
            answers.append(
                RankedList(
                    items=items[row][:size],
                    scores=values[row][:size],
                    sources=[SOURCES[code] for code in sources[row][:size]],
                    model_version=self.version,
                    engine=self.engine,
                    timings_ms=timings_ms,
                )
            )
        return answers

    def _check(self, table: Float32) -> None:
        """Refuse a model whose answers have the wrong shape or are not finite."""
        known = len(self._vocabulary.item_ids)
        rows = np.linspace(1, max(1, known), self.buckets.histories[-1]).astype(np.int32)
        for engine in self._engines:
            for history in self.buckets.histories:
                shape = (1, history)
                inputs: Tensors = {
                    "items": rows[:history].reshape(shape),
                    "categories": np.ones(shape, np.int32),
                    "behaviors": np.ones(shape, np.int32),
                    "gaps": np.ones(shape, np.int32),
                    "lengths": np.array([history], np.int32),
                }
                batch = self.buckets.batches[0]
                inputs = {name: pad_rows(array, batch) for name, array in inputs.items()}
                states = engine.run("encode", inputs)
                width = self.buckets.candidates[0]
                candidates = np.resize(rows, (batch, width))
                scores = engine.run(
                    "score",
                    {
                        **states,
                        "lengths": inputs["lengths"],
                        "candidates": candidates,
                        "candidate_categories": np.ones_like(candidates),
                    },
                )["scores"]
                if states["user_vector"].shape != (batch, table.shape[1]) or scores.shape != (batch, width):
                    raise ModelUnavailable(f"{self.version}: {self.engine} answers with the wrong shape")
                if not (np.isfinite(states["user_vector"]).all() and np.isfinite(scores).all()):
                    raise ModelUnavailable(f"{self.version}: {self.engine} gives numbers that are not finite")


class _Stages:
    """How long each stage of a batch took, in milliseconds."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._ms: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._ms[stage] = round((now - self._last) * 1e3, 3)
        metrics.stage_seconds(stage).observe(now - self._last)
        self._last = now

    def finish(self, stage: str) -> dict[str, float]:
        """One dictionary for the whole batch: its lists share it."""
        self.lap(stage)
        self._ms["rank"] = round((self._last - self._started) * 1e3, 3)
        return self._ms


def _warmed(
    artefact: Artefact, buckets: Buckets, settings: InferenceSettings
) -> tuple[Engine, dict[Shape, float]]:
    engine = engines.create(settings.engine, settings.engine_options())
    engine.load(artefact, _GRAPHS)
    try:
        return engine, engine.warm_up(buckets.shapes())
    except EngineFailed as error:
        raise ModelUnavailable(f"{artefact.version}: {error}") from error


def _cut_out(arrays: HistoryArrays, cut: Cut) -> Tensors:
    """The users of a cut, padded to its shape. Shorter histories have only padding beyond the cut."""
    if len(arrays) == cut.batch == 1:
        return {name: array[..., : cut.history] for name, array in arrays.tensors().items()}
    return {
        name: pad_rows(array[cut.users] if array.ndim == 1 else array[cut.users, : cut.history], cut.batch)
        for name, array in arrays.tensors().items()
    }


def _at_places(states: Tensors, places: Int64, cut: Cut, buckets: Buckets) -> Tensors:
    """Encoded histories of some users of a cut; the arrays as they are when that is all of them."""
    if len(places) == len(cut.users):
        return dict(states)
    batch = fit(buckets.batches, len(places))
    return {name: pad_rows(array[places], batch) for name, array in states.items()}


def _padded(rows: Int32, batch: int, width: int) -> Int32:
    if rows.shape == (batch, width):
        return np.ascontiguousarray(rows)
    padded = np.zeros((batch, width), np.int32)
    padded[: rows.shape[0], : rows.shape[1]] = rows
    return padded
