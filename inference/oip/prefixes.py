"""`rank` for clients that send whole histories, computed as for the stream: what is known is not encoded.

Of a model whose candidates are scored by the user vector alone, a history that begins with one that was asked
for lately costs the events that came since. Nobody is named: a history is found by its first events and
compared whole, so an answer rests on what was sent and on nothing else.
"""

from __future__ import annotations

import numpy as np

from compression.releases.registry import Artefact, ModelShape
from inference.buckets import Buckets, pad_rows
from inference.encoder import Encoder, scores_of
from inference.engines.base import Engine
from inference.histories import Sent
from inference.types import Tensors
from inference.user_cache import UserCache


class Prefixes:
    """For one released version. Safe to call from several threads."""

    def __init__(self, model: ModelShape, cache: UserCache) -> None:
        self._dim = model.dim
        self._cache = cache
        self._encoder = Encoder(model, 0, cache)

    @classmethod
    def of(cls, artefact: Artefact, budget_mb: float) -> Prefixes | None:
        """None where nothing can be appended to, or a score needs states, which `rank` at once then
        computes for less (inference/LOG.md); and where there is no room."""
        model = artefact.manifest.model
        if "append" not in artefact.manifest.graphs or not model.scores_by_vector:
            return None
        cache = UserCache.within(budget_mb, model, retrieved=0, listed=0)
        if cache is None:
            return None
        for _ in cache.make_room(cache.slots):  # so that no request waits for the system's pages
            pass
        return cls(model, cache)

    def rank(self, engine: Engine, buckets: Buckets, inputs: Tensors) -> Tensors:
        """`scores` and `user_vector` of the graph's inputs [users, …], as many users as there are."""
        encoded = self._encoder.encode(engine, buckets, Sent(inputs))
        candidates, categories = inputs["candidates"], inputs["candidate_categories"]
        scores = np.empty(candidates.shape, np.float32)
        everybody = np.ones(len(candidates), np.bool_)
        with self._encoder.completed(engine, buckets, encoded, everybody) as cuts:
            for cut, states in cuts:
                asked = {
                    "candidates": pad_rows(candidates[cut.users], cut.batch),
                    "candidate_categories": pad_rows(categories[cut.users], cut.batch),
                }
                scores[cut.users] = scores_of(engine, states, asked)[: len(cut.users)]
        vectors = encoded.derived.vectors
        self._encoder.keep(encoded, np.asarray(np.isfinite(vectors).all(axis=1)))
        return {"scores": scores, "user_vector": vectors}
