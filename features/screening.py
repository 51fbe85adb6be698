"""All rows to candidates: each item once, those that may appear, best first, capped by category.

The same rows, weighed otherwise, are the evidence that is added to the network's score of an item
(`features.fusion`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from features.candidate_rows import (
    CATEGORY,
    LAST_SOURCE,
    POPULAR,
    RECENT,
    SOURCE_BITS,
    TRANSITION,
    WEIGHT,
    Bool,
    Candidates,
    Float32,
    Int64,
    Rows,
    in_lines,
)
from features.fusion import Fusion
from features.settings import FeatureSettings

_PLACE_BITS: Final = 20
_LAST_PLACE: Final = (1 << _PLACE_BITS) - 1
_NO_KEY: Final = np.iinfo(np.int64).max
_SHARE_BITS: Final = 10
_PER_EVIDENCE: Final = np.float32(1.0 / (1 << 20 + _SHARE_BITS))


@dataclass(frozen=True, slots=True, eq=False)
class Union:
    """Each (user, item) once, users in order, then items: its greatest score, whose lowest bits name the best
    source, the sum of its scores (negative: it must not appear), and its evidence where there is a fusion.

    `order` [users, rows] says which row of all came to which place, `first` which places start an item.
    """

    order: Int64
    first: Int64
    item: Int64
    most: Int64
    score: Int64
    evidence: Int64 | None

    def evidence_at(self, columns: tuple[int, int], users: Sequence[int]) -> Float32:
        """What was found for the items in these columns of the rows, of some users."""
        lines, width = self.order.shape
        found = np.zeros((lines, width), np.int64)
        if self.evidence is not None and found.size:
            lengths = np.diff(self.first, append=found.size)
            found.ravel()[self.order.ravel()] = self.evidence.repeat(lengths)
        named = found[list(users), columns[0] : columns[1]]
        return (named * _PER_EVIDENCE).astype(np.float32)


def united(rows: Rows, shares: Int64 | None) -> Union:
    """`shares`: what of a row's screening score is evidence, by the lowest bits of its score."""
    if not rows.items:
        none = np.empty(0, np.int64)
        return Union(
            np.empty((rows.users, 0), np.int64), none, none, none, none, None if shares is None else none
        )
    items, scores = np.concatenate(rows.items, axis=1), np.concatenate(rows.scores, axis=1)
    # Sorting many short rows is several times faster than one long column.
    order = items.argsort(axis=1)
    users, width = order.shape
    if users > 1:
        order += np.arange(0, users * width, width)[:, None]
    item, score = items.take(order.ravel()), scores.take(order.ravel())
    new = np.empty(len(item), np.bool_)
    np.not_equal(item[1:], item[:-1], out=new[1:])
    new[::width] = True
    first = new.nonzero()[0]
    evidence = None
    if shares is not None:
        evidence = np.add.reduceat((score >> SOURCE_BITS) * shares.take(score & LAST_SOURCE), first)
    return Union(
        order=order,
        first=first,
        item=item.take(first),
        most=np.maximum.reduceat(score, first),
        score=np.add.reduceat(score, first),
        evidence=evidence,
    )


@lru_cache(maxsize=16)
def shares_of(fusion: Fusion) -> Int64:
    """What of a row's screening score is evidence, by the lowest bits of its score; of a veto nothing."""
    weights = np.zeros(1 << SOURCE_BITS)
    chosen = [(TRANSITION, fusion.transition), (RECENT, fusion.recent)]
    chosen += [(CATEGORY, fusion.category), (POPULAR, fusion.popular)]
    for source, weight in chosen:
        weights[LAST_SOURCE - source] = weight / WEIGHT[source]
    return np.rint(weights * (1 << _SHARE_BITS)).astype(np.int64)


def screen(
    union: Union,
    users: int,
    category_of: Callable[[Int64], npt.NDArray[np.integer]] | None,
    settings: FeatureSettings,
) -> Candidates:
    """Best first within each user, at most `category_cap` of a category, at most `limit`."""
    limit = settings.candidate_limit
    ranked, counts = _ranked(union, users)
    width = ranked.shape[1]
    least = int(counts.min(initial=width))
    # The cap seldom reaches past twice the limit; where it does, all of them are looked at.
    for depth in (min(width, limit), min(width, 2 * limit), width):
        row, chosen = ranked[:, :depth], None
        if least < depth:
            chosen = np.arange(depth) < counts[:, None]
            row = np.where(chosen, row, 0)
        item = union.item.take(row) if len(union.item) else row
        if category_of is None or depth <= settings.category_cap:
            break
        over = _over_cap(category_of(item), chosen, settings.category_cap)
        if over is None:
            break
        chosen = ~over if chosen is None else chosen & ~over
        found = _counted(chosen)
        if depth == width or not ((found < limit) & (counts > depth)).any():
            break
    if depth > limit and chosen is not None:
        chosen &= np.cumsum(chosen, axis=1) <= limit
    elif depth > limit:
        row, item = row[:, :limit], item[:, :limit]
    code, evidence = union.most.take(row), None
    if union.evidence is not None:
        evidence = (union.evidence.take(row) * _PER_EVIDENCE).astype(np.float32)
    source = (LAST_SOURCE - (code & LAST_SOURCE)).astype(np.uint8)
    if chosen is None:
        return Candidates(item, source, np.full(users, row.shape[1]), evidence)
    return _left(Candidates(item, source, counts, evidence), chosen)


def _left(candidates: Candidates, chosen: Bool) -> Candidates:
    """Those that were chosen, moved to the left."""
    counts = _counted(chosen)
    filled = np.arange(counts.max(initial=0)) < counts[:, None]
    return Candidates(
        in_lines(filled, candidates.items[chosen], 0),
        in_lines(filled, candidates.sources[chosen], 0),
        counts,
        None if candidates.evidence is None else in_lines(filled, candidates.evidence[chosen], 0),
    )


def _counted(chosen: Bool) -> Int64:
    """How many of each line."""
    return np.asarray(np.add.reduce(chosen, axis=1, dtype=np.int64))


def _ranked(union: Union, users: int) -> tuple[Int64, Int64]:
    """The places of each user's items in the union, best first [users, items], and how many of these may
    appear; what comes after means nothing."""
    # Lower is better; equal scores go by item, because they come in that order.
    key = np.maximum(union.score, -1)
    key <<= _PLACE_BITS
    if users == 1:
        key = np.subtract(np.arange(len(key)), key, out=key)
        key.sort()
        return (key & _LAST_PLACE)[None], np.array([key.searchsorted(_LAST_PLACE, side="right")])
    line = union.first // max(1, union.order.shape[1])
    counts = np.bincount(line, minlength=users)
    starts = np.cumsum(counts) - counts
    place = np.arange(len(key)) - starts.repeat(counts)
    dense = np.full((users, int(counts.max(initial=0))), _NO_KEY)
    dense[line, place] = place - key
    dense.sort(axis=1)
    return (dense & _LAST_PLACE) + starts[:, None], _counted(dense <= _LAST_PLACE)


def _over_cap(categories: npt.NDArray[np.integer], valid: Bool | None, cap: int) -> Bool | None:
    """Which valid columns of each line, best first, come after the first `cap` of their category; None where
    there are none. Without `valid` every column is."""
    if valid is not None:
        categories = np.where(valid, categories, -1)
    # Categories in order, each one's columns in order. What is not capped comes first and is negative.
    ordered = categories.astype(np.int64)
    ordered <<= _PLACE_BITS
    ordered += np.arange(categories.shape[1])
    ordered.sort(axis=1)
    category = ordered >> _PLACE_BITS
    late = category[:, cap:] == category[:, :-cap]
    if not late.any():
        return None
    late &= category[:, cap:] >= 0
    line, at = late.nonzero()
    if not len(at):
        return None
    over = np.zeros(categories.shape, np.bool_)
    over[line, ordered[line, at + cap] & _LAST_PLACE] = True
    return over
