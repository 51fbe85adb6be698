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
pay. Everything is one flat list of rows, sorted once by (user, item). Scores are whole numbers with
the source in the lowest bits, so sums do not depend on the order of rows: what a user gets does
not depend on who else is in the batch.

The same rows, weighed otherwise, are the evidence that is added to the network's score of an item
(`features.fusion`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final, get_args

import numpy as np
import numpy.typing as npt

from features.fusion import Fusion
from features.sequence import SequenceBatch
from features.settings import FeatureSettings
from features.statistics import ItemWeights, StatisticsReader
from topics.messages import BEHAVIORS, MAX_ID, Source

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

SOURCES: Final[tuple[Source, ...]] = get_args(Source)
"""Names of source codes."""
RETRIEVAL, TRANSITION, RECENT, CATEGORY, POPULAR, REQUEST = range(6)
_BUY: Final = BEHAVIORS.index("buy")

_WEIGHT: Final = np.array([4.0, 12.0, 4.0, 0.5, 0.1], np.float32)
_RECENT_BACK: Final = np.power(0.97, np.arange(100), dtype=np.float32)
_TRANSITION_BACK: Final = np.power(0.8, np.arange(100), dtype=np.float32)
_CATEGORY_FACTORS: Final = [0.5 * 0.7**back for back in range(100)]


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
    if everybody_asks and not fusion:
        return _given(explicit, exclude)
    rows = _Rows()
    _add_sources(rows, histories, statistics, retrieved, settings)
    _add_vetoes(rows, histories, exclude, asked, settings)
    union = _union(rows, users, fusion)
    if everybody_asks:
        return _with_evidence(_given(explicit, exclude), union, asked)
    found = _screen(union, users, category_of, settings)
    if not asked:
        return found
    placed = _place_explicit(found, asked, explicit, exclude)
    return _with_evidence(placed, union, asked) if fusion else placed


_ONE: Final = np.float32(1 << 20)
_SOURCE_BITS: Final = 3
_LAST_SOURCE: Final = (1 << _SOURCE_BITS) - 1
_DEBT: Final = -(1 << 50)
_MOST_SCORE: Final = 1 << 40
_PLACE_BITS: Final = 20
_LAST_PLACE: Final = (1 << _PLACE_BITS) - 1
_MOST_USERS: Final = 1 << 16

_SHARE_BITS: Final = 10
_PER_EVIDENCE: Final = np.float32(1.0 / (1 << 20 + _SHARE_BITS))


@dataclass(frozen=True, slots=True, eq=False)
class _Union:
    """Each (user, item) once, users in order, then items: its best source, its screening score (negative:
    it must not appear) and its evidence, whole numbers both; no evidence without a fusion."""

    user: Int64
    item: Int64
    source: npt.NDArray[np.uint8]
    score: Int64
    evidence: Int64 | None

    def allowed(self) -> _Union:
        kept = self.score >= 0
        evidence = None if self.evidence is None else self.evidence[kept]
        return _Union(self.user[kept], self.item[kept], self.source[kept], self.score[kept], evidence)


class _Rows:
    """Columns in the making: user, item, and the score with its source in the lowest bits."""

    def __init__(self) -> None:
        self.users: list[Int64] = []
        self.items: list[Int64] = []
        self.scores: list[Int64] = []

    def add(self, users: Int64, items: Int64, source: int, scores: Float32) -> None:
        whole = (scores * _ONE).astype(np.int64)
        self.users.append(users)
        self.items.append(items)
        # Of equal scores the earlier source is the greater number.
        self.scores.append((whole << _SOURCE_BITS) + (_LAST_SOURCE - source))

    def veto(self, users: Int64, items: Int64) -> None:
        self.users.append(users)
        self.items.append(items)
        self.scores.append(np.full(len(items), _DEBT))

    def add_lists(
        self, users: npt.ArrayLike, lists: Sequence[ItemWeights], source: int, factors: npt.ArrayLike
    ) -> None:
        """One list per entry of `users`, its weights times its factor."""
        if not lists:
            return
        lengths = [len(one.items) for one in lists]
        weights = np.concatenate([one.weights for one in lists])
        self.add(
            np.repeat(np.asarray(users, np.int64), lengths),
            np.concatenate([one.items for one in lists]),
            source,
            weights * np.repeat(np.asarray(factors, np.float32), lengths),
        )


def _add_sources(
    rows: _Rows,
    histories: SequenceBatch,
    statistics: StatisticsReader,
    retrieved: tuple[Int64, Float32] | None,
    settings: FeatureSettings,
) -> None:
    users = len(histories)
    lengths = histories.lengths
    user = np.repeat(np.arange(users), lengths)
    back = np.repeat(np.cumsum(lengths), lengths) - 1 - np.arange(len(user))

    recent = back < settings.recent_events
    rows.add(
        user[recent],
        histories.items[recent],
        RECENT,
        _WEIGHT[RECENT] * _RECENT_BACK[back[recent]],
    )

    start = back < settings.transition_events
    rows.add_lists(
        user[start],
        statistics.transitions(histories.items[start].tolist()),
        TRANSITION,
        _WEIGHT[TRANSITION] * _TRANSITION_BACK[back[start]],
    )

    category_users, categories, factors = _recent_categories(
        histories, settings.recent_categories, settings.transition_events
    )
    rows.add_lists(category_users, statistics.categories(categories), CATEGORY, factors)

    popular = statistics.popular()
    count = len(popular.items)
    rows.add(
        np.repeat(np.arange(users), count),
        np.tile(popular.items, users),
        POPULAR,
        np.tile(_WEIGHT[POPULAR] * popular.weights, users),
    )

    if retrieved is not None and retrieved[0].size:
        ids, scores = retrieved
        valid = (ids >= 0) & np.isfinite(scores)
        low = np.where(valid, scores, np.inf).min(axis=1, keepdims=True)
        high = np.where(valid, scores, -np.inf).max(axis=1, keepdims=True)
        # Without history the model knows nothing that popularity does not, unless there is none.
        found = valid & ((lengths > 0)[:, None] | (count == 0))
        with np.errstate(invalid="ignore"):
            scaled = (scores - low) / np.maximum(high - low, 1e-6)
        rows.add(
            np.repeat(np.arange(users), ids.shape[1])[found.ravel()],
            ids[found],
            RETRIEVAL,
            (_WEIGHT[RETRIEVAL] * scaled[found]).astype(np.float32),
        )


def _recent_categories(
    histories: SequenceBatch, most: int, events: int
) -> tuple[list[int], list[int], list[float]]:
    """The last distinct categories of each user's newest events, with the factor of each."""
    users: list[int] = []
    categories: list[int] = []
    factors: list[float] = []
    flat = histories.categories
    end = 0
    for user, length in enumerate(histories.lengths.tolist()):
        end += length
        newest = flat[end - min(length, events) : end][::-1].tolist()
        distinct = list(dict.fromkeys(newest))[:most]
        users += [user] * len(distinct)
        categories += distinct
        factors += _CATEGORY_FACTORS[: len(distinct)]
    return users, categories, factors


def _add_vetoes(
    rows: _Rows,
    histories: SequenceBatch,
    exclude: Sequence[Sequence[int]],
    asked: Sequence[int],
    settings: FeatureSettings,
) -> None:
    user = np.repeat(np.arange(len(histories)), histories.lengths)
    if settings.seen_filter != "none":
        seen = slice(None) if settings.seen_filter == "seen" else histories.behaviors == _BUY
        rows.veto(user[seen], histories.items[seen])
    skip = set(asked)
    unwanted = [(user, item) for user, given in enumerate(exclude) if user not in skip for item in given]
    if unwanted:
        of, items = np.array(unwanted, np.int64).T
        rows.veto(of, items)


def _union(rows: _Rows, users: int, fusion: Fusion | None) -> _Union:
    user, item, score = np.concatenate(rows.users), np.concatenate(rows.items), np.concatenate(rows.scores)
    if not len(item):
        return _Union(user, item, score.astype(np.uint8), score, score if fusion else None)
    # Sorting many short rows is several times faster than one long column; 16 bits sort by radix.
    if users > 1:
        by_user = np.argsort(user.astype(np.uint16), kind="stable")
        user, item, score = user[by_user], item[by_user], score[by_user]
    starts, counts, cell, width = _cells(user, users)
    dense = np.full(users * width, MAX_ID)
    dense[cell] = item
    within = np.argsort(dense.reshape(users, width), axis=1)
    order = (starts[:, None] + within)[within < counts[:, None]]
    item, score = item[order], score[order]
    first = np.flatnonzero(np.concatenate(([True], (item[1:] != item[:-1]) | (user[1:] != user[:-1]))))
    total = np.add.reduceat(score, first)
    most = np.maximum.reduceat(score, first)
    evidence = None
    if fusion:
        shares = _shares_of(fusion).take(score & _LAST_SOURCE)
        evidence = np.add.reduceat((score >> _SOURCE_BITS) * shares, first)
    source = (_LAST_SOURCE - (most & _LAST_SOURCE)).astype(np.uint8)
    return _Union(user[first], item[first], source, total, evidence)


def _shares_of(fusion: Fusion) -> Int64:
    """What of a row's screening score is evidence, by the lowest bits of its score; of a veto nothing."""
    weights = np.zeros(1 << _SOURCE_BITS)
    chosen = [(TRANSITION, fusion.transition), (RECENT, fusion.recent)]
    chosen += [(CATEGORY, fusion.category), (POPULAR, fusion.popular)]
    for source, weight in chosen:
        weights[_LAST_SOURCE - source] = weight / _WEIGHT[source]
    return np.rint(weights * (1 << _SHARE_BITS)).astype(np.int64)


def _cells(user: Int64, users: int) -> tuple[Int64, Int64, Int64, int]:
    """Where the rows of each user start, how many there are, the cell of each row in a matrix with
    a line per user, and the width of that matrix."""
    if users == 1:
        return np.zeros(1, np.int64), np.array([len(user)]), np.arange(len(user)), len(user)
    counts = np.bincount(user, minlength=users)
    starts = np.cumsum(counts) - counts
    width = int(counts.max(initial=0))
    cell = np.arange(len(user)) + np.repeat(np.arange(users) * width - starts, counts)
    return starts, counts, cell, width


def _screen(
    union: _Union,
    users: int,
    category_of: Callable[[Int64], npt.NDArray[np.integer]] | None,
    settings: FeatureSettings,
) -> Candidates:
    """Best first within each user, at most `category_cap` of a category, at most `limit`."""
    union = union.allowed()
    user, item = union.user, union.item
    limit = settings.candidate_limit
    starts, counts, cell, width = _cells(user, users)
    # Lower is better; equal scores go by item, because rows come in that order.
    dense = np.full(users * width, MAX_ID)
    dense[cell] = (
        ((_MOST_SCORE - union.score) << _PLACE_BITS) + cell - np.repeat(np.arange(users) * width, counts)
    )
    ranked = np.sort(dense.reshape(users, width), axis=1) & _LAST_PLACE
    # The cap seldom reaches past twice the limit; where it does, all of them are looked at.
    depth = width if category_of is None else min(width, 2 * limit)
    while True:
        valid = np.arange(depth) < counts[:, None]
        row = np.where(valid, starts[:, None] + ranked[:, :depth], 0)
        if category_of is not None and len(item):
            valid &= _within_cap(category_of(item[row].ravel()).reshape(row.shape), settings.category_cap)
        found = np.count_nonzero(valid, axis=1)
        if depth == width or not ((found < limit) & (counts > depth)).any():
            break
        depth = width
    place = np.cumsum(valid, axis=1, dtype=np.int64)
    line, column = np.nonzero(valid & (place <= limit))
    row, place = row[line, column], place[line, column] - 1
    counts = np.minimum(found, limit).astype(np.int64)
    items = np.zeros((users, int(counts.max(initial=0))), np.int64)
    sources = np.zeros(items.shape, np.uint8)
    items[line, place] = item[row]
    sources[line, place] = union.source[row]
    if union.evidence is None:
        return Candidates(items, sources, counts)
    evidence = np.zeros(items.shape, np.float32)
    evidence[line, place] = union.evidence[row] * _PER_EVIDENCE
    return Candidates(items, sources, counts, evidence)


def _within_cap(categories: npt.NDArray[np.integer], cap: int) -> npt.NDArray[np.bool_]:
    """Which of each line's columns, best first, are among the first `cap` of their category."""
    lines, width = categories.shape
    order = np.argsort(categories, axis=1, kind="stable")
    order += np.arange(lines)[:, None] * width
    ordered = categories.take(order)
    at = np.arange(width)
    new = np.ones(categories.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    nth = at - np.maximum.accumulate(np.where(new, at, 0), axis=1)
    allowed = np.empty(categories.shape, bool)
    allowed.ravel()[order] = nth < cap
    return allowed | (categories < 0)


def _given(explicit: Sequence[Sequence[int] | None], exclude: Sequence[Sequence[int]]) -> Candidates:
    """What users asked for by name."""
    lists = [list(dict.fromkeys(given or ())) for given in explicit]
    if any(exclude):
        lists = [
            [item for item in given if item not in unwanted]
            for given, unwanted in zip(lists, map(set, exclude), strict=True)
        ]
    counts = np.fromiter(map(len, lists), np.int64, len(lists))
    filled = np.arange(counts.max(initial=0)) < counts[:, None]
    items = np.zeros(filled.shape, np.int64)
    items[filled] = np.fromiter(chain.from_iterable(lists), np.int64, int(counts.sum()))
    return Candidates(items, np.where(filled, np.uint8(REQUEST), np.uint8(0)), counts)


def _place_explicit(
    found: Candidates,
    asked: Sequence[int],
    explicit: Sequence[Sequence[int] | None],
    exclude: Sequence[Sequence[int]],
) -> Candidates:
    """What was found for the others beside what was asked for by name."""
    given = _given([explicit[user] for user in asked], [exclude[user] for user in asked] if exclude else ())
    counts = found.counts.copy()
    counts[list(asked)] = given.counts
    width = int(counts.max(initial=0))
    items = np.zeros((len(counts), width), np.int64)
    sources = np.zeros((len(counts), width), np.uint8)
    for whose, part in ((slice(None), found), (list(asked), given)):
        common = min(width, part.items.shape[1])
        items[whose] = 0
        items[whose, :common] = part.items[:, :common]
        sources[whose] = 0
        sources[whose, :common] = part.sources[:, :common]
    evidence = None
    if found.evidence is not None:
        evidence = np.zeros(items.shape, np.float32)
        common = min(width, found.evidence.shape[1])
        evidence[:, :common] = found.evidence[:, :common]
    return Candidates(items, sources, counts, evidence)


def _with_evidence(placed: Candidates, union: _Union, asked: Sequence[int]) -> Candidates:
    """The evidence for what was asked for by name, vetoed or not."""
    evidence = np.zeros(placed.items.shape, np.float32) if placed.evidence is None else placed.evidence
    if placed.items.size and len(union.item) and union.evidence is not None:
        users = np.array(asked)
        names, code = np.unique(union.item, return_inverse=True)
        items = placed.items[users]
        known = np.minimum(np.searchsorted(names, items), len(names) - 1)
        # Rows come by user, then item, and so do these.
        rows = union.user * len(names) + code
        wanted = users[:, None] * len(names) + known
        at = np.minimum(np.searchsorted(rows, wanted), len(rows) - 1)
        filled = np.arange(items.shape[1]) < placed.counts[users][:, None]
        there = filled & (names[known] == items) & (rows[at] == wanted)
        evidence[users] = np.where(there, union.evidence[at] * _PER_EVIDENCE, np.float32(0))
    return replace(placed, evidence=evidence)
