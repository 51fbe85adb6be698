"""Histories that look like those a model will be asked about, drawn from the artefact alone.

Known items with their own categories, the popular more often (a power law over rows, which is all that
an artefact tells of popularity), behaviours in the shares of a shop's log. Equal seeds draw equally.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from compression.releases.registry import Artefact
from features.encoding import GAP_ROWS, Vocabulary
from inference.engines.base import INPUTS, EngineOptions, inputs_of
from inference.types import Graph, Tensors

_SHARES: Final = (0.90, 0.06, 0.03, 0.01)  # of views, carts, favourites and purchases


def draw(
    vocabulary: Vocabulary, *, users: int, history: int, candidates: int, rng: np.random.Generator
) -> Tensors:
    """Inputs of "rank": right-padded histories of 0 to `history` events, the first user's full."""
    lengths = rng.integers(0, history + 1, users).astype(np.int32)
    lengths[0] = history
    seen = np.arange(history) < lengths[:, None]
    items, categories = _items(vocabulary, (users, history), rng)
    behaviors = rng.choice(np.arange(1, 5), (users, history), p=_SHARES)
    gaps = rng.integers(0, GAP_ROWS, (users, history))
    asked, asked_categories = _items(vocabulary, (users, candidates), rng)
    columns = {"items": items, "categories": categories, "behaviors": behaviors, "gaps": gaps}
    return {
        **{name: np.where(seen, rows, 0).astype(np.int32) for name, rows in columns.items()},
        "lengths": lengths,
        "candidates": asked,
        "candidate_categories": asked_categories,
    }


def samples(artefact: Artefact, graph: Graph, *, batches: int = 32, seed: int = 17) -> list[Tensors]:
    """Inputs of a graph to find the ranges of its activations with, histories of every length."""
    from inference.engines.onnx_engine import OnnxEngine

    rng = np.random.default_rng(seed)
    vocabulary = artefact.vocabulary()
    longest = artefact.manifest.model.max_history
    encoder = OnnxEngine(EngineOptions())
    encoder.load(artefact, ("encode",))
    found: list[Tensors] = []
    for history in np.linspace(1, longest, batches).astype(int).tolist():
        drawn = draw(vocabulary, users=8, history=history, candidates=50, rng=rng)
        if graph in ("score", "append"):
            drawn |= encoder.run("encode", {name: drawn[name] for name in INPUTS["encode"]})
        if graph == "append":
            drawn |= _newest_apart(drawn)
        found.append({name: drawn[name] for name in inputs_of(graph, artefact.manifest.model)})
    encoder.close()
    return found


def _newest_apart(drawn: Tensors) -> Tensors:
    """The newest event of each history as the one to append to those before it."""
    before = np.maximum(drawn["lengths"] - 1, 0)
    columns = (name for name in INPUTS["encode"] if name != "lengths")
    newest = {name: np.take_along_axis(drawn[name], before[:, None], 1) for name in columns}
    return {**newest, "lengths": before}


def _items(
    vocabulary: Vocabulary, shape: tuple[int, int], rng: np.random.Generator
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Rows of items and of their categories; one item in fifty is unknown, in a hash bucket."""
    known = len(vocabulary.item_ids)
    unknown = (rng.random(shape) < 0.02) | (known == 0)
    place = np.minimum((known * rng.random(shape) ** 2).astype(np.int64), max(0, known - 1))
    buckets = rng.integers(1 + known, vocabulary.item_rows, shape)
    items = np.where(unknown, buckets, place + 1).astype(np.int32)
    own = vocabulary.item_categories[place] if known else np.zeros(shape, np.int32)
    categories = np.where(unknown, vocabulary.unknown_category_row, own).astype(np.int32)
    return items, categories
