"""THE PAGE TO READ: packed sequences in, ranked lists out.

    unpack → encode → retrieve → candidates → score → keep → fuse and select

One released version is one ranker: vocabulary, item table, retrieval index and graphs were published
together and are opened together, so versions cannot mix. A score is the network's logit plus what the
statistics know by now of the candidate (`features.fusion`), as the version's manifest weighs it.
`rank` is synchronous and vectorised, and called in the thread of the lane whose warmed engine it is
given (`inference.plane`).
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from compression.releases.registry import Artefact, ArtefactInvalid, ModelShape, Registry
from features.anchor import from_anchors
from features.candidate_rows import SOURCES, Candidates
from features.candidates import find_candidates
from features.encoding import Vocabulary
from features.sequence import MAX_EVENTS, SequenceBatch, unpack
from features.settings import FeatureSettings
from features.statistics import ItemStatistics
from inference import engines, metrics
from inference.buckets import Buckets, Cut, fit, pad_rows
from inference.cost_model import CostModel
from inference.encoder import Encoded, Encoder, scores_of, scoring, states_of
from inference.engines.base import Engine, EngineOptions, Shape, graphs_of
from inference.errors import EngineFailed, InferenceError, ModelUnavailable
from inference.histories import Packed
from inference.lookup import ItemLookup
from inference.prepared import Prepared
from inference.retrieval import RetrievalIndex
from inference.settings import InferenceSettings
from inference.types import Graph, RankedList, RankRequest, Tensors
from inference.user_cache import UserCache

log = logging.getLogger(__name__)

Int32 = npt.NDArray[np.int32]
# Scores of at most so many candidates are remembered: they are compared each with each.
_MOST_LISTED: Final = 100
_NAMES: Final = np.array(SOURCES, object)

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Warmed:
    """An engine that has run every shape of its buckets, which hold what each took. One thread at a time."""

    engine: Engine
    buckets: Buckets

    @property
    def name(self) -> str:
        return self.engine.name

    def cost_s(self, most: int) -> dict[int, float]:
        """Seconds for the longest histories by batch size, powers of two up to the one that holds `most`: a
        lane's first guess. Sizes that were not warmed are foreseen (`inference.cost_model`)."""
        longest, width = self.buckets.histories[-1], self.buckets.candidates[0]
        known = {batch: self.buckets.cost(batch, longest) for batch in self.buckets.batches}
        if most > self.buckets.batches[-1] and self.buckets.cost_s:
            foreseen = CostModel.fit(self.engine.model, self.buckets.cost_s)
            size = 2 * self.buckets.batches[-1]
            while size < 2 * most:
                known[size] = foreseen.predict(size, longest, width)
                size *= 2
        return known

    def close(self) -> None:
        self.engine.close()


class Ranker:
    """A released version: verified, indexed, and able to warm engines of its own."""

    def __init__(
        self,
        artefact: Artefact,
        vocabulary: Vocabulary,
        index: RetrievalIndex,
        *,
        settings: InferenceSettings,
        features: FeatureSettings,
        prepared: Prepared | None = None,
    ) -> None:
        self.version = artefact.version
        # Longer sequences than that are kept of nobody, whatever a network takes.
        self.buckets = settings.buckets().up_to(min(artefact.manifest.model.max_history, MAX_EVENTS))
        self._artefact = artefact
        self._prepared = prepared
        if prepared is not None:
            weakref.finalize(self, _close, prepared.held()).atexit = False
        self._vocabulary = vocabulary
        self._lookup = ItemLookup(vocabulary)
        self._index = index
        self._retrieved = settings.retrieved
        self._hop = settings.hop_of(artefact.manifest, self.buckets.histories[-1])
        self._features = features
        chosen = artefact.manifest.fusion
        self._fusion = chosen and chosen.times(settings.fusion)
        self._model = artefact.manifest.model
        retrieved = min(settings.retrieved, len(index))
        cache = UserCache.within(
            settings.cache_mb,
            self._model,
            retrieved=retrieved,
            # Of a vector nothing is gained by looking a score up.
            listed=0 if self._model.scores_by_vector else min(features.candidate_limit, _MOST_LISTED),
        )
        self._encoder = Encoder(self._model, retrieved, cache)
        self._cache = cache

    @classmethod
    def open(
        cls,
        registry_root: str | Path,
        alias: str = "serving",
        *,
        sha256: str | None = None,
        settings: InferenceSettings | None = None,
        features: FeatureSettings | None = None,
        rest: Callable[[], bool] = lambda: False,
        aside: Callable[[Callable[[], Any]], Any] = lambda work: work(),
        prepared: Prepared | None = None,
    ) -> Ranker:
        """Verify, load and index, with a `rest` in between; what computes long without the interpreter's
        lock is done `aside`. `sha256` is the manifest's, where somebody promised one. Raises
        `ModelUnavailable` with the reason, also when `rest` says that there is no need to go on. Takes
        seconds, or milliseconds where the version was `prepared`: not for the event loop's thread."""
        settings, features = settings or InferenceSettings(), features or FeatureSettings()
        registry = Registry(registry_root)
        try:
            if prepared is not None:
                artefact = registry.open(prepared.version, sha256=prepared.sha256, check_files=False)
                vocabulary = artefact.vocabulary()
                _go_on(rest)
                index = RetrievalIndex.load(prepared.index, vocabulary.item_ids, probes=settings.probes)
            else:
                artefact = aside(partial(registry.open, alias, sha256=sha256))
                _go_on(rest)
                vocabulary, table = artefact.vocabulary(), artefact.item_table()
                _go_on(rest)
                index = aside(
                    partial(
                        RetrievalIndex.build,
                        vocabulary.item_ids,
                        table[1 : 1 + len(vocabulary.item_ids)],
                        exact_until=settings.exact_until,
                        probes=settings.probes,
                    )
                )
        except ArtefactInvalid as error:
            raise ModelUnavailable(str(error)) from error
        _go_on(rest)
        return cls(artefact, vocabulary, index, settings=settings, features=features, prepared=prepared)

    @property
    def model(self) -> ModelShape:
        return self._model

    @property
    def users(self) -> int:
        """Of whom something is kept."""
        return 0 if self._cache is None else len(self._cache)

    def make_room(self, users: int, rest: Callable[[], bool] = lambda: False) -> None:
        """Have memory for so many users before they come, with a `rest` in between. Raises `ModelUnavailable`
        when that says that there is no need to go on."""
        if self._cache is not None:
            for _ in self._cache.make_room(users):
                _go_on(rest)

    def warm(
        self,
        name: str = "auto",
        options: EngineOptions | None = None,
        rest: Callable[[], bool] = lambda: False,
        known_s: Mapping[Shape, float] | None = None,
    ) -> Warmed:
        """An engine with this version's graphs, every bucket run and what comes out checked; ready then.

        Between two graphs or shapes there is a `rest`, which may say that there is no need to go on. What
        shapes cost is measured, unless it is `known_s` from an engine like this one; where its library
        compiles nothing for a shape, a few are then run for all. Raises `ModelUnavailable` with the reason.
        Takes seconds.
        """
        engine = engines.create(name, options or EngineOptions())
        graphs = graphs_of(engine, cached=self._cache is not None, artefact=self._artefact)
        try:
            self._load(engine, name, graphs, rest)
            score, kinds = scoring(engine), {"append": "append" in graphs, "rank": self._at_once(engine)}
            few = bool(known_s) and not engine.compiles_shapes
            wanted = self.buckets.a_few(**kinds) if few else self.buckets.shapes(**kinds)
            shapes = (
                shape._replace(graph=score) if shape.graph == "score" else shape
                for shape in _resting(rest, wanted)
            )
            measured_s = engine.warm_up(shapes, repeats=1) if known_s else engine.warm_up(shapes)
            costs_s = {
                shape._replace(graph="score") if shape.graph == score else shape: cost_s
                for shape, cost_s in measured_s.items()
            }
            warmed = Warmed(engine, self.buckets.with_costs(known_s or costs_s))
            self.check(warmed)
        except EngineFailed as error:
            engine.close()
            raise ModelUnavailable(f"{self.version}: {error}") from error
        except ModelUnavailable:
            engine.close()
            raise
        return warmed

    @staticmethod
    def beside(warmed: Warmed) -> Warmed | None:
        """An engine for one more thread, as warm as this one, where the library shares one among threads."""
        engine = warmed.engine.beside()
        return None if engine is None else Warmed(engine, warmed.buckets)

    def _at_once(self, engine: Engine) -> bool:
        """Whether known candidates go with their history in one graph: states are of no use where nothing
        keeps them."""
        return self._cache is None and engine.keeps_states and "rank" in self._artefact.manifest.graphs

    def _load(self, engine: Engine, name: str, graphs: Sequence[Graph], rest: Callable[[], bool]) -> None:
        folder = None if self._prepared is None else self._prepared.of_engine(name, engine.options)
        if folder is None:
            engine.load(self._artefact, graphs)
            return
        for graph in graphs:
            try:
                engine.load_prepared(self._model, (graph,), folder)
            except ModelUnavailable as error:  # it may have been tidied away
                log.warning("%s is loaded as it was published: %s", self.version, error)
                engine.load(self._artefact, graphs)
                return
            _go_on(rest)

    def rank(
        self, warmed: Warmed, requests: Sequence[RankRequest], statistics: ItemStatistics
    ) -> list[RankedList | InferenceError]:
        """One answer per request, in order. What an engine fails at raises `EngineFailed`."""
        clock = _Stages()
        histories = unpack([request.sequence for request in requests], last=self._model.max_history)
        shown = from_anchors(histories, self.buckets.histories[-1], self._hop)
        packed = Packed(requests, shown, self._lookup)
        clock.lap("unpack")
        if self._at_once(warmed.engine) and _all_given(requests):
            candidates = self._candidates(requests, histories, statistics, None)
            if candidates.items.shape[1] <= warmed.buckets.candidates[-1]:
                clock.lap("candidates")
                scores = self._rank_at_once(warmed, packed, candidates)
                sound = _sound(scores, candidates.counts)
                clock.lap("score")
                return self._select(warmed.name, requests, candidates, scores, sound, clock)
        encoded = self._encoder.encode(warmed.engine, warmed.buckets, packed)
        clock.lap("encode")
        retrieved = self._retrieve(requests, histories, encoded, statistics)
        clock.lap("retrieve")
        candidates = self._candidates(requests, histories, statistics, retrieved)
        clock.lap("candidates")
        scores = self._score(warmed, encoded, candidates)
        clock.lap("score")
        sound = _sound(scores, candidates.counts) & _finite(encoded.derived.vectors)
        self._encoder.keep(encoded, sound)
        clock.lap("keep")
        return self._select(warmed.name, requests, candidates, scores, sound, clock)

    def _candidates(
        self,
        requests: Sequence[RankRequest],
        histories: SequenceBatch,
        statistics: ItemStatistics,
        retrieved: tuple[Int64, Float32] | None,
    ) -> Candidates:
        return find_candidates(
            histories,
            statistics,
            retrieved=retrieved,
            exclude=[request.exclude for request in requests],
            explicit=[request.candidates for request in requests],
            category_of=self._lookup.capped_categories,
            settings=self._features,
            fusion=self._fusion,
        )

    def _rank_at_once(self, warmed: Warmed, histories: Packed, candidates: Candidates) -> Float32:
        """As `_score`, encoding on the way."""
        items, counts = candidates.items, candidates.counts
        rows = self._lookup.rows(items)
        width = fit(warmed.buckets.candidates, items.shape[1])
        scores = np.empty(items.shape, np.float32)
        for cut, inputs in self._encoder.inputs(warmed.buckets, histories, "rank"):
            asked = _padded(rows[cut.users], cut.batch, width)
            inputs["candidates"] = asked
            inputs["candidate_categories"] = self._lookup.categories_of_rows(asked)
            answer = warmed.engine.run_for("rank", inputs, ("scores",))["scores"]
            scores[cut.users] = answer[: len(cut.users), : items.shape[1]]
        if len(counts) and counts.min() < items.shape[1]:
            scores[np.arange(items.shape[1]) >= counts[:, None]] = -np.inf
        return scores

    def _retrieve(
        self,
        requests: Sequence[RankRequest],
        histories: SequenceBatch,
        encoded: Encoded,
        statistics: ItemStatistics,
    ) -> tuple[Int64, Float32] | None:
        """Ids and scores [users, n]; -1 for users who bring candidates, or whom popularity serves."""
        known = encoded.derived
        asks = np.array([request.candidates is None for request in requests], np.bool_)
        if len(statistics.popular()):
            asks &= histories.lengths > 0
        asks &= _finite(known.vectors)
        if not asks.any():
            return None
        searched = (asks & ~known.has_retrieved).nonzero()[0]
        if len(searched):
            vectors = known.vectors if len(searched) == len(asks) else known.vectors[searched]
            found = self._index.search(vectors, self._retrieved)
            known.items[searched], known.item_scores[searched] = found
            known.has_retrieved[searched] = True
            encoded.news[searched] = True
        if asks.all():
            return known.items, known.item_scores
        return np.where(asks[:, None], known.items, -1), known.item_scores

    def _score(self, warmed: Warmed, encoded: Encoded, candidates: Candidates) -> Float32:
        """Scores [users, width]; minus infinity where there is no candidate."""
        items, counts = candidates.items, candidates.counts
        rows = self._lookup.rows(items)
        scores, known = encoded.derived.scores_of(rows, counts)
        needed = (counts > 0) & ~known
        with self._encoder.completed(warmed.engine, warmed.buckets, encoded, needed) as cuts:
            for cut, states in cuts:
                column = 0
                places = needed[cut.users].nonzero()[0]
                while len(places):
                    users = cut.users[places]
                    # A width that every one of them fills; who has more candidates goes on to the next.
                    width = fit(warmed.buckets.candidates, int(counts[users].min()) - column)
                    columns = slice(column, column + width)
                    inputs = _at_places(states, places, cut, warmed.buckets)
                    asked = _padded(rows[users, columns], len(inputs["lengths"]), width)
                    categories = self._lookup.categories_of_rows(asked)
                    answer = scores_of(
                        warmed.engine, inputs, {"candidates": asked, "candidate_categories": categories}
                    )
                    filled = min(width, items.shape[1] - column)
                    scores[users, columns] = answer[: len(users), :filled]
                    column += width
                    places = places[counts[users] > column]
        if len(counts) and counts.min() < items.shape[1]:
            scores[np.arange(items.shape[1]) >= counts[:, None]] = -np.inf
        if encoded.keys and encoded.derived.listed and not known.all():
            scored = (~known).nonzero()[0]
            encoded.derived.note_scores(scored, rows, counts, scores)
            encoded.news[scored] = True
        return scores

    def _select(
        self,
        engine: str,
        requests: Sequence[RankRequest],
        candidates: Candidates,
        scores: Float32,
        sound: Bool,
        clock: _Stages,
    ) -> list[RankedList | InferenceError]:
        """The k best of each, the network's scores and the evidence together; equal scores keep the order of
        the candidates. What the cache keeps are the network's alone: evidence is never old."""
        if candidates.evidence is not None:
            scores = scores + candidates.evidence
        most = max([request.k for request in requests], default=0)
        places = (-scores).argsort(axis=1, kind="stable")[:, :most]
        if len(places) > 1:
            places += np.arange(len(places))[:, None] * scores.shape[1]
        items = candidates.items.take(places).tolist()
        sources = _NAMES.take(candidates.sources.take(places)).tolist()
        values = scores.take(places).tolist()
        timings_ms = clock.finish("select")
        answers: list[RankedList | InferenceError] = []
        for row, (request, count, good) in enumerate(
            zip(requests, candidates.counts.tolist(), sound.tolist(), strict=True)
        ):
            if not good:
                answers.append(EngineFailed(f"{engine}: numbers that are not finite"))
                continue
            size = min(request.k, count)
            answers.append(
                RankedList(
                    items=items[row][:size],
                    scores=values[row][:size],
                    sources=sources[row][:size],
                    model_version=self.version,
                    engine=engine,
                    timings_ms=timings_ms,
                )
            )
        return answers

    def check(self, warmed: Warmed) -> None:
        """Raises `ModelUnavailable` where the engine's answers have the wrong shape or are not finite."""
        for history in warmed.buckets.histories:
            self._check_history(warmed, history)

    def probe(self, warmed: Warmed) -> float:
        """The same on the shortest history: cheap enough to ask an engine whether it is well. Seconds that it
        took when the engine was warmed."""
        buckets = warmed.buckets
        self._check_history(warmed, buckets.histories[0])
        return buckets.cost(buckets.batches[0], buckets.histories[0])

    def _check_history(self, warmed: Warmed, history: int) -> None:
        engine, buckets = warmed.engine, warmed.buckets
        known = len(self._vocabulary.item_ids)
        rows = np.linspace(1, max(1, known), buckets.histories[-1]).astype(np.int32)
        shape = (1, history)
        inputs: Tensors = {
            "items": rows[:history].reshape(shape),
            "categories": np.ones(shape, np.int32),
            "behaviors": np.ones(shape, np.int32),
            "gaps": np.ones(shape, np.int32),
            "lengths": np.array([history], np.int32),
        }
        batch, width = buckets.batches[0], buckets.candidates[0]
        inputs = {name: pad_rows(array, batch) for name, array in inputs.items()}
        states = states_of(engine, inputs)
        candidates = np.resize(rows, (batch, width))
        asked = {"candidates": candidates, "candidate_categories": np.ones_like(candidates)}
        scores = scores_of(engine, states, asked)
        if states["user_vector"].shape != (batch, self._model.dim) or scores.shape != (batch, width):
            raise ModelUnavailable(f"{self.version}: {warmed.name} answers with the wrong shape")
        if not (np.isfinite(states["user_vector"]).all() and np.isfinite(scores).all()):
            raise ModelUnavailable(f"{self.version}: {warmed.name} gives numbers that are not finite")


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


def _resting(rest: Callable[[], bool], shapes: Iterable[Shape]) -> Iterator[Shape]:
    for shape in shapes:
        _go_on(rest)
        yield shape


def _go_on(rest: Callable[[], bool]) -> None:
    if rest():
        raise ModelUnavailable("not needed any more")


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _finite(vectors: Float32) -> Bool:
    """Which of them [users, dim] hold numbers only."""
    return np.asarray(np.logical_and.reduce(np.isfinite(vectors), axis=1))


def _sound(scores: Float32, counts: Int64) -> Bool:
    """Whose scores [users, width] are numbers, minus infinity being ours beyond the count and the engine's
    before it."""
    return np.asarray(np.add.reduce(np.isfinite(scores), axis=1, dtype=np.int64) == counts)


def _all_given(requests: Sequence[RankRequest]) -> bool:
    return all(request.candidates is not None for request in requests)


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
