"""Candidates for a batch of users: the union of the sources, screened down to what the ranker takes.

The screening score of an item is the sum over its sources of

    retrieval   4.0 × the model's score, scaled to 0–1 within the user's list
    transition 12.0 × the share of users who went there × 0.8 per event back
    recent      4.0 × 0.97 per event back, so a revisited item adds up
    category    0.5 × popularity within the category × 0.7 per category back
    popular     0.1 × popularity

and its source is the one that gave most. (Of the next clicks in `users_1k` of the Taobao log, a
replay without a model: 20 % among the 50, 18 % with 0.93 per event back; most are revisits, so what
a user saw long ago is worth keeping.) An item that must not appear gets a debt no source can
pay. Everything is one matrix of rows, a line per user, each sorted once by item. Scores are whole numbers
with the source in the lowest bits, so sums do not depend on the order of rows: what a user gets does
not depend on who else is in the batch.

The same rows, weighed otherwise, are the evidence that is added to the network's score of an item
(`features.fusion`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from typing import Any, Final, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from features.fusion import Fusion
from features.sequence import SequenceBatch
from features.settings import FeatureSettings
from features.statistics import ItemWeights, StatisticsReader
from topics.messages import BEHAVIORS, Source

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Number = TypeVar("Number", bound=np.number[Any])

SOURCES: Final[tuple[Source, ...]] = get_args(Source)
"""Names of source codes."""
RETRIEVAL, TRANSITION, RECENT, CATEGORY, POPULAR, REQUEST = range(6)
_BUY: Final = BEHAVIORS.index("buy")

_SOURCE_BITS: Final = 3
_LAST_SOURCE: Final = (1 << _SOURCE_BITS) - 1
_ONE: Final = np.float32(1 << 20)
_DEBT: Final = -(1 << 50)
_PLACE_BITS: Final = 20
_LAST_PLACE: Final = (1 << _PLACE_BITS) - 1
_MOST_USERS: Final = 1 << 16
_NO_ITEM: Final = -1
_NO_KEY: Final = np.iinfo(np.int64).max

_WEIGHT: Final = np.array([4.0, 12.0, 4.0, 0.5, 0.1], np.float32)
# Factors of up to a hundred events back, those of events oldest first, those of categories newest first.
_RECENT: Final = _WEIGHT[RECENT] * np.power(0.97, np.arange(100), dtype=np.float32)[::-1]
_AFTER: Final = _ONE * (_WEIGHT[TRANSITION] * np.power(0.8, np.arange(100), dtype=np.float32)[::-1])
_WITHIN: Final = _ONE * np.array([0.5 * 0.7**back for back in range(100)], np.float32)
_AFTER_SOURCE: Final = np.full(100, _LAST_SOURCE - TRANSITION)
_WITHIN_SOURCE: Final = np.full(100, _LAST_SOURCE - CATEGORY)

_SHARE_BITS: Final = 10
_PER_EVIDENCE: Final = np.float32(1.0 / (1 << 20 + _SHARE_BITS))


@dataclass(frozen=True, slots=True)
class Candidates:
    """Per user at most `limit` items, best screening score first; rows are padded at the end.

    items int64 [users, width] (padding 0), sources uint8 [users, width] (`SOURCES`), counts int64
    [users]. The width is that of the longest row. evidence float32 [users, width] is what the fusion
    adds to scores (padding 0); None where nothing is added.
    """

    items: Int64
    sources: npt.NDArray[np.uint8]
    counts: Int64
    evidence: Float32 | None = None


def find_candidates(
    histories: SequenceBatch,
    statistics: StatisticsReader,
    *,
    retrieved: tuple[Int64, Float32] | None = None,
    exclude: Sequence[Sequence[int]] = (),
    explicit: Sequence[Sequence[int] | None] = (),
    category_of: Callable[[Int64], npt.NDArray[np.integer]] | None = None,
    settings: FeatureSettings,
    fusion: Fusion | None = None,
) -> Candidates:
    """Candidates of every user of the batch.

    `retrieved` is what the model found: ids and scores [users, n], a negative id is none. `exclude`
    and `explicit` are per user, or empty. A user with `explicit` candidates gets those (each once,
    in the order given, less `exclude`) and nothing else: no limit, no cap, no seen filter.
    `category_of` maps ids to categories for the cap; a negative category is unknown and not capped.
    A user without history gets what is popular. At most 65,536 users in one call. With a `fusion` every
    candidate comes with its evidence, whoever named it.
    """
    users = len(histories)
    if users > _MOST_USERS:
        raise ValueError(f"{users} users in one call, at most {_MOST_USERS}")
    asked = [user for user, given in enumerate(explicit) if given is not None]
    everybody_asks = bool(users) and len(asked) == users
    shares = _shares_of(fusion) if fusion else None
    given = None
    if asked:
        given = _given(
            [explicit[user] for user in asked], [exclude[user] for user in asked] if exclude else ()
        )
        if everybody_asks and shares is None:
            return given
    rows = _Rows(users)
    _add_recent(rows, histories, settings.recent_events)
    _add_lists(rows, histories, statistics, settings)
    popular = statistics.popular()
    if len(popular):
        rows.add_to_all(*_scored_popular(popular))
    named = None
    if given is not None and shares is not None:
        named = rows.add_named(asked, given)
    if not everybody_asks:
        if retrieved is not None and retrieved[0].size:
            _add_retrieved(rows, histories.lengths, retrieved, needs_history=len(popular) > 0)
        _add_vetoes(rows, histories, exclude, settings)
    union = _union(rows, shares)
    if given is None:
        return _screen(union, users, category_of, settings)
    evidence = None if named is None else union.evidence_at(named, asked)
    if everybody_asks:
        return replace(given, evidence=evidence)
    found = _screen(union, users, category_of, settings)
    return _place_given(found, asked, given, evidence)


class _Rows:
    """Columns in the making, a line per user: items, and scores with their source in the lowest bits.
    Where a line has fewer rows than others it is padded, with no item and a negative score."""

    def __init__(self, users: int) -> None:
        self.users = users
        self.items: list[Int64] = []
        self.scores: list[Int64] = []

    def add(self, items: Int64, scores: Int64) -> None:
        """[users, rows] of both."""
        self.items.append(items)
        self.scores.append(scores)

    def add_to_all(self, items: Int64, scores: Int64) -> None:
        """The same rows to every line."""
        self.add(items[None].repeat(self.users, axis=0), scores[None].repeat(self.users, axis=0))

    def add_ragged(self, counts: Sequence[int], items: Int64, scores: Int64) -> None:
        """So many rows to each line, in order."""
        width = max(counts)
        if width * self.users == len(items):
            self.add(items.reshape(self.users, width), scores.reshape(self.users, width))
            return
        filled = np.arange(width) < np.array(counts)[:, None]
        self.add(_filled(filled, items, _NO_ITEM), _filled(filled, scores, -1))

    def add_named(self, users: Sequence[int], given: Candidates) -> tuple[int, int]:
        """Rows that add nothing, for what some users named to be found again: where their columns start
        and end."""
        items = np.full((self.users, given.items.shape[1]), _NO_ITEM)
        there = np.arange(items.shape[1]) < given.counts[:, None]
        items[list(users)] = np.where(there, given.items, _NO_ITEM)
        start = sum(column.shape[1] for column in self.items)
        self.add(items, np.where(items == _NO_ITEM, -1, 0))
        return start, start + items.shape[1]


def _filled(filled: Bool, values: npt.NDArray[Number], padding: int) -> npt.NDArray[Number]:
    """Values in order, a line as many as are to be filled of it."""
    matrix = np.full(filled.shape, padding, values.dtype)
    matrix[filled] = values
    return matrix


def _scored(scores: Float32, source: int) -> Int64:
    """Whole numbers. Of equal scores the earlier source is the greater one."""
    whole = (scores * _ONE).astype(np.int64)
    whole <<= _SOURCE_BITS
    whole += _LAST_SOURCE - source
    return whole


_RECENT_SCORES: Final = _scored(_RECENT, RECENT)


@lru_cache(maxsize=4)
def _scored_popular(popular: ItemWeights) -> tuple[Int64, Int64]:
    """The same rows until what is popular has been read anew."""
    return popular.items, _scored(_WEIGHT[POPULAR] * popular.weights, POPULAR)


def _add_recent(rows: _Rows, histories: SequenceBatch, most: int) -> None:
    counts, items = histories.lengths, histories.items
    width = int(counts.max(initial=0))
    if width > most:
        newest = np.cumsum(counts).repeat(counts) - np.arange(len(items)) <= most
        items, counts, width = items[newest], np.minimum(counts, most), most
    if not width:
        return
    scores = _RECENT_SCORES[-width:]
    if width * rows.users == len(items):
        rows.add(items.reshape(rows.users, width), scores[None].repeat(rows.users, axis=0))
    else:
        # To the right, so that events equally far back share a column.
        filled = np.arange(width) >= width - counts[:, None]
        rows.add(_filled(filled, items, _NO_ITEM), np.where(filled, scores, -1))


def _add_lists(
    rows: _Rows, histories: SequenceBatch, statistics: StatisticsReader, settings: FeatureSettings
) -> None:
    """What follows each user's newest events, and what is popular in their last distinct categories."""
    most, most_categories = settings.transition_events, settings.recent_categories
    starts: list[int] = []
    categories: list[int] = []
    counts: list[tuple[int, int]] = []
    end = 0
    for length in histories.lengths.tolist():
        end += length
        newest = slice(end - min(length, most), end)
        starts += histories.items[newest].tolist()
        distinct = list(dict.fromkeys(histories.categories[newest][::-1].tolist()))[:most_categories]
        categories += distinct
        counts.append((min(length, most), len(distinct)))
    after, within = iter(statistics.transitions(starts)), iter(statistics.categories(categories))
    lists: list[ItemWeights] = []
    factors: list[Float32] = []
    sources: list[Int64] = []
    per_user: list[int] = []
    for events, distinct_count in counts:
        of_user = [*islice(after, events), *islice(within, distinct_count)]
        lists += of_user
        factors += (_AFTER[100 - events :], _WITHIN[:distinct_count])
        sources += (_AFTER_SOURCE[:events], _WITHIN_SOURCE[:distinct_count])
        per_user.append(sum([len(one.items) for one in of_user]))
    if not any(per_user):
        return
    lengths = np.array([len(one.items) for one in lists])
    weights = np.concatenate([one.weights for one in lists])
    weights *= np.concatenate(factors).repeat(lengths)
    scores = weights.astype(np.int64)
    scores <<= _SOURCE_BITS
    scores += np.concatenate(sources).repeat(lengths)
    rows.add_ragged(per_user, np.concatenate([one.items for one in lists]), scores)


def _add_retrieved(
    rows: _Rows, lengths: Int64, retrieved: tuple[Int64, Float32], *, needs_history: bool
) -> None:
    """`needs_history`: without it the model knows nothing that popularity does not."""
    ids, scores = retrieved
    low = np.minimum.reduce(scores, axis=1, keepdims=True)
    high = np.maximum.reduce(scores, axis=1, keepdims=True)
    finite = math.isfinite(low.min()) and math.isfinite(high.max())
    if finite and ids.min() >= 0 and (not needs_history or lengths.min() > 0):
        scaled = scores - low
        scaled /= np.maximum(high - low, 1e-6)
        rows.add(ids, _scored(_WEIGHT[RETRIEVAL] * scaled, RETRIEVAL))
        return
    valid = (ids >= 0) & np.isfinite(scores)
    if needs_history:
        valid &= (lengths > 0)[:, None]
    low = np.where(valid, scores, np.inf).min(axis=1, keepdims=True)
    high = np.where(valid, scores, -np.inf).max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        scaled = np.where(valid, (scores - low) / np.maximum(high - low, 1e-6), np.float32(0))
    found = _scored(_WEIGHT[RETRIEVAL] * scaled, RETRIEVAL)
    rows.add(np.where(valid, ids, _NO_ITEM), np.where(valid, found, -1))


def _add_vetoes(
    rows: _Rows, histories: SequenceBatch, exclude: Sequence[Sequence[int]], settings: FeatureSettings
) -> None:
    if settings.seen_filter != "none":
        items, lengths = histories.items, histories.lengths
        counts = lengths
        if settings.seen_filter == "bought":
            bought = (histories.behaviors == _BUY).nonzero()[0]
            items = items[bought]
            if len(items):
                users = np.arange(len(lengths)).repeat(lengths)
                counts = np.bincount(users[bought], minlength=len(lengths))
        if len(items):
            rows.add_ragged(counts.tolist(), items, np.full(len(items), _DEBT))
    if any(exclude):
        unwanted = np.fromiter(chain.from_iterable(exclude), np.int64)
        rows.add_ragged([len(given) for given in exclude], unwanted, np.full(len(unwanted), _DEBT))


@dataclass(frozen=True, slots=True, eq=False)
class _Union:
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


def _union(rows: _Rows, shares: Int64 | None) -> _Union:
    """`shares`: what of a row's screening score is evidence, by the lowest bits of its score."""
    if not rows.items:
        none = np.empty(0, np.int64)
        return _Union(
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
        evidence = np.add.reduceat((score >> _SOURCE_BITS) * shares.take(score & _LAST_SOURCE), first)
    return _Union(
        order=order,
        first=first,
        item=item.take(first),
        most=np.maximum.reduceat(score, first),
        score=np.add.reduceat(score, first),
        evidence=evidence,
    )


@lru_cache(maxsize=16)
def _shares_of(fusion: Fusion) -> Int64:
    """What of a row's screening score is evidence, by the lowest bits of its score; of a veto nothing."""
    weights = np.zeros(1 << _SOURCE_BITS)
    chosen = [(TRANSITION, fusion.transition), (RECENT, fusion.recent)]
    chosen += [(CATEGORY, fusion.category), (POPULAR, fusion.popular)]
    for source, weight in chosen:
        weights[_LAST_SOURCE - source] = weight / _WEIGHT[source]
    return np.rint(weights * (1 << _SHARE_BITS)).astype(np.int64)


def _screen(
    union: _Union,
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
    source = (_LAST_SOURCE - (code & _LAST_SOURCE)).astype(np.uint8)
    if chosen is None:
        return Candidates(item, source, np.full(users, row.shape[1]), evidence)
    return _left(Candidates(item, source, counts, evidence), chosen)


def _left(candidates: Candidates, chosen: Bool) -> Candidates:
    """Those that were chosen, moved to the left."""
    counts = _counted(chosen)
    filled = np.arange(counts.max(initial=0)) < counts[:, None]
    return Candidates(
        _filled(filled, candidates.items[chosen], 0),
        _filled(filled, candidates.sources[chosen], 0),
        counts,
        None if candidates.evidence is None else _filled(filled, candidates.evidence[chosen], 0),
    )


def _counted(chosen: Bool) -> Int64:
    """How many of each line."""
    return np.asarray(np.add.reduce(chosen, axis=1, dtype=np.int64))


def _ranked(union: _Union, users: int) -> tuple[Int64, Int64]:
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


def _given(explicit: Sequence[Sequence[int] | None], exclude: Sequence[Sequence[int]]) -> Candidates:
    """What users asked for by name."""
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
    return Candidates(_filled(filled, flat, 0), np.where(filled, np.uint8(REQUEST), np.uint8(0)), counts)


def _place_given(
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
