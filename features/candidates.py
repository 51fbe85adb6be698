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
pay. What a user gets does not depend on who else is in the batch.

Rows are in `candidate_rows`, what is made of them in `screening`, what is asked for by name in
`named_candidates`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain, islice
from typing import Final

import numpy as np
import numpy.typing as npt

from features.candidate_rows import (
    CATEGORY,
    LAST_SOURCE,
    NO_ITEM,
    ONE,
    POPULAR,
    RECENT,
    RETRIEVAL,
    SOURCE_BITS,
    TRANSITION,
    WEIGHT,
    Candidates,
    Float32,
    Int64,
    Rows,
    in_lines,
    scored,
)
from features.fusion import Fusion
from features.named_candidates import asked_for, place_asked_for
from features.screening import screen, shares_of, united
from features.sequence import SequenceBatch
from features.settings import FeatureSettings
from features.statistics import ItemWeights, StatisticsReader
from topics.messages import BEHAVIORS

_BUY: Final = BEHAVIORS.index("buy")
_DEBT: Final = -(1 << 50)
_MOST_USERS: Final = 1 << 16

# Factors of up to a hundred events back, those of events oldest first, those of categories newest first.
_RECENT: Final = WEIGHT[RECENT] * np.power(0.97, np.arange(100), dtype=np.float32)[::-1]
_AFTER: Final = ONE * (WEIGHT[TRANSITION] * np.power(0.8, np.arange(100), dtype=np.float32)[::-1])
_WITHIN: Final = ONE * np.array([float(WEIGHT[CATEGORY]) * 0.7**back for back in range(100)], np.float32)
_AFTER_SOURCE: Final = np.full(100, LAST_SOURCE - TRANSITION)
_WITHIN_SOURCE: Final = np.full(100, LAST_SOURCE - CATEGORY)


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
    shares = shares_of(fusion) if fusion else None
    given = None
    if asked:
        given = asked_for(
            [explicit[user] for user in asked], [exclude[user] for user in asked] if exclude else ()
        )
        if everybody_asks and shares is None:
            return given
    rows = Rows(users)
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
    union = united(rows, shares)
    if given is None:
        return screen(union, users, category_of, settings)
    evidence = None if named is None else union.evidence_at(named, asked)
    if everybody_asks:
        return replace(given, evidence=evidence)
    found = screen(union, users, category_of, settings)
    return place_asked_for(found, asked, given, evidence)


_RECENT_SCORES: Final = scored(_RECENT, RECENT)


@lru_cache(maxsize=4)
def _scored_popular(popular: ItemWeights) -> tuple[Int64, Int64]:
    """The same rows until what is popular has been read anew."""
    return popular.items, scored(WEIGHT[POPULAR] * popular.weights, POPULAR)


def _add_recent(rows: Rows, histories: SequenceBatch, most: int) -> None:
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
        rows.add(in_lines(filled, items, NO_ITEM), np.where(filled, scores, -1))


def _add_lists(
    rows: Rows, histories: SequenceBatch, statistics: StatisticsReader, settings: FeatureSettings
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
    scores <<= SOURCE_BITS
    scores += np.concatenate(sources).repeat(lengths)
    rows.add_ragged(per_user, np.concatenate([one.items for one in lists]), scores)


def _add_retrieved(
    rows: Rows, lengths: Int64, retrieved: tuple[Int64, Float32], *, needs_history: bool
) -> None:
    """`needs_history`: without it the model knows nothing that popularity does not."""
    ids, scores = retrieved
    low = np.minimum.reduce(scores, axis=1, keepdims=True)
    high = np.maximum.reduce(scores, axis=1, keepdims=True)
    finite = math.isfinite(low.min()) and math.isfinite(high.max())
    if finite and ids.min() >= 0 and (not needs_history or lengths.min() > 0):
        scaled = scores - low
        scaled /= np.maximum(high - low, 1e-6)
        rows.add(ids, scored(WEIGHT[RETRIEVAL] * scaled, RETRIEVAL))
        return
    valid = (ids >= 0) & np.isfinite(scores)
    if needs_history:
        valid &= (lengths > 0)[:, None]
    low = np.where(valid, scores, np.inf).min(axis=1, keepdims=True)
    high = np.where(valid, scores, -np.inf).max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        scaled = np.where(valid, (scores - low) / np.maximum(high - low, 1e-6), np.float32(0))
    found = scored(WEIGHT[RETRIEVAL] * scaled, RETRIEVAL)
    rows.add(np.where(valid, ids, NO_ITEM), np.where(valid, found, -1))


def _add_vetoes(
    rows: Rows, histories: SequenceBatch, exclude: Sequence[Sequence[int]], settings: FeatureSettings
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
