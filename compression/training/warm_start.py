"""Training that starts from a version that is there: its rows by id, the rest of its weights as they are.

An item that is new starts as the hash bucket that stood for it until now, which is what the network knew of
it. An item that the new log lacks keeps its row.

A version that was compressed into other sizes brings the network before that along: training starts from
there, and what it makes is compressed anew.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from compression.errors import ArtefactInvalid
from compression.releases.registry import Artefact, Manifest, ModelShape
from features.encoding import Vocabulary

WEIGHTS: Final = "weights.safetensors"
TEACHER: Final = "teacher.safetensors"
_TABLES: Final = {"items.weight": "items", "categories.weight": "categories"}

Rows = npt.NDArray[np.int64]


def trained_as(manifest: Manifest) -> tuple[str, ModelShape]:
    """The file with the weights that training ended with, and the network they are of."""
    told = manifest.data.get("teacher")
    if told is None:
        return WEIGHTS, manifest.model
    try:
        return TEACHER, ModelShape.model_validate(told)
    except ValidationError:
        raise ArtefactInvalid(f"{manifest.version}: the manifest does not say what {TEACHER} is of") from None


def check_shape(serving: ModelShape, wanted: ModelShape) -> None:
    """`ArtefactInvalid` where the weights of one network are none for the other: only tables may grow."""
    free = {"item_rows", "category_rows"}
    differ = [
        f"{name} {getattr(serving, name)}, not {getattr(wanted, name)}"
        for name in ModelShape.model_fields
        if name not in free and getattr(serving, name) != getattr(wanted, name)
    ]
    if differ:
        raise ArtefactInvalid(
            f"the serving version has {'; '.join(differ)}: train with its recipe, or without --from-serving"
        )


def grown(before: Vocabulary, latest: Vocabulary, max_items: int) -> Vocabulary:
    """What either knows; an item's category is the latest. Where that is too much, items that only
    the version before knows give way, the largest ids first."""
    categories = np.union1d(before.category_ids, latest.category_ids)
    kept = before.item_ids[~latest.is_known(before.item_ids)][: max(0, max_items - len(latest.item_ids))]
    items = np.union1d(kept, latest.item_ids)

    def category_rows(vocabulary: Vocabulary, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        rows = vocabulary.category_rows_of_items(ids)
        return (np.searchsorted(categories, vocabulary.category_ids[rows - 1]) + 1).astype(np.int32)

    of_item = np.zeros(len(items), np.int32)
    fresh = latest.is_known(items)
    of_item[fresh] = category_rows(latest, items[fresh])
    of_item[~fresh] = category_rows(before, items[~fresh])
    return Vocabulary(items, of_item, categories, before.item_buckets, before.category_buckets)


def starting_weights(
    serving: Artefact, before: Vocabulary, vocabulary: Vocabulary, file: str = WEIGHTS
) -> dict[str, Any]:
    """The serving version's weights for a network over `vocabulary`: torch tensors by name."""
    import torch

    from compression.training.weights import read

    try:
        weights: dict[str, Any] = read(serving.read(file))
    except ValueError as error:
        raise ArtefactInvalid(f"{serving.version}: {file}: {error}") from None
    sources = {
        "items": np.concatenate([[0], before.item_rows_of(vocabulary.item_ids), _buckets(before)]),
        "categories": np.concatenate(
            [[0], before.category_rows_of(vocabulary.category_ids), _category_buckets(before)]
        ),
    }
    for name, table in _TABLES.items():
        weights[name] = weights[name][torch.from_numpy(sources[table].astype(np.int64))].clone()
    return weights


def _buckets(vocabulary: Vocabulary) -> Rows:
    first = 1 + len(vocabulary.item_ids)
    return np.arange(first, first + vocabulary.item_buckets)


def _category_buckets(vocabulary: Vocabulary) -> Rows:
    first = 1 + len(vocabulary.category_ids)
    return np.arange(first, first + vocabulary.category_buckets)
