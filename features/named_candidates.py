"""Candidates that users asked for by name."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from features.candidate_rows import REQUEST, Candidates, Float32, Number, in_lines


def asked_for(explicit: Sequence[Sequence[int] | None], exclude: Sequence[Sequence[int]]) -> Candidates:
    """What users asked for by name, each once."""
    if not any(exclude):
        given = _all_different(explicit)
        if given is not None:
            return given
    lists = [list(dict.fromkeys(given or ())) for given in explicit]
    if any(exclude):
        lists = [
            [item for item in given if item not in unwanted]
            for given, unwanted in zip(lists, map(set, exclude), strict=True)
        ]
    counts = np.array([len(given) for given in lists])
    filled = np.arange(counts.max(initial=0)) < counts[:, None]
    flat = np.fromiter(chain.from_iterable(lists), np.int64)
    if len(flat) == filled.size:
        return Candidates(flat.reshape(filled.shape), np.full(filled.shape, REQUEST, np.uint8), counts)
    return Candidates(in_lines(filled, flat, 0), np.where(filled, np.uint8(REQUEST), np.uint8(0)), counts)


def _all_different(explicit: Sequence[Sequence[int] | None]) -> Candidates | None:
    """The same without a look at each item, where all name equally many and nobody one twice; else None."""
    width = len(explicit[0] or ()) if explicit else 0
    if not width or any(given is None or len(given) != width for given in explicit):
        return None
    flat = np.fromiter(chain.from_iterable(filter(None, explicit)), np.int64, width * len(explicit))
    items = flat.reshape(len(explicit), width)
    ordered = np.sort(items, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        return None
    counts = np.full(len(items), width)
    return Candidates(items, np.full(items.shape, REQUEST, np.uint8), counts)


def place_asked_for(
    found: Candidates, asked: Sequence[int], given: Candidates, evidence: Float32 | None
) -> Candidates:
    """What was found for the others beside what was asked for by name, with its evidence."""
    counts = found.counts.copy()
    counts[list(asked)] = given.counts
    shape = len(counts), int(counts.max(initial=0))

    def placed(theirs: npt.NDArray[Number], own: npt.NDArray[Number]) -> npt.NDArray[Number]:
        both = np.zeros(shape, theirs.dtype)
        for whose, part in ((slice(None), theirs), (list(asked), own)):
            common = min(shape[1], part.shape[1])
            both[whose] = 0
            both[whose, :common] = part[:, :common]
        return both

    return Candidates(
        placed(found.items, given.items),
        placed(found.sources, given.sources),
        counts,
        None if found.evidence is None or evidence is None else placed(found.evidence, evidence),
    )
