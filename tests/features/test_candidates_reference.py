"""Candidates against a reference in plain Python, over random batches: what is found, in which order, from
which source and with which evidence."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from features.candidate_rows import CATEGORY, POPULAR, RECENT, REQUEST, RETRIEVAL, TRANSITION
from features.candidates import find_candidates
from features.fusion import Fusion
from features.sequence import SequenceBatch
from features.settings import FeatureSettings
from features.statistics import NOTHING, ItemWeights

ITEMS = 400
CATEGORIES = 12
BUY = 3
Listed = list[tuple[int, int, float]]  # item, source, evidence


@dataclass
class Counts:
    """Statistics that do not change."""

    after: dict[int, ItemWeights]
    within: dict[int, ItemWeights]
    most: ItemWeights

    def transitions(self, items: Sequence[int]) -> list[ItemWeights]:
        return [self.after.get(item, NOTHING) for item in items]

    def categories(self, categories: Sequence[int]) -> list[ItemWeights]:
        return [self.within.get(category, NOTHING) for category in categories]

    def popular(self) -> ItemWeights:
        return self.most


@dataclass
class World:
    """One batch and all that is asked about it."""

    histories: SequenceBatch
    counts: Counts
    retrieved: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
    exclude: list[tuple[int, ...]]
    explicit: list[tuple[int, ...] | None]
    category_of_item: npt.NDArray[np.int32]
    settings: FeatureSettings
    fusion: Fusion | None

    def found(self) -> list[Listed]:
        found = find_candidates(
            self.histories,
            self.counts,
            retrieved=self.retrieved,
            exclude=self.exclude,
            explicit=self.explicit,
            category_of=self.category_of_item.take,
            settings=self.settings,
            fusion=self.fusion,
        )
        width = int(found.counts.max(initial=0))
        assert found.items.shape == found.sources.shape == (len(self.histories), width)
        evidence = np.zeros(found.items.shape, np.float32) if found.evidence is None else found.evidence
        padding = np.arange(width) >= found.counts[:, None]
        assert not (found.items[padding].any() or found.sources[padding].any() or evidence[padding].any())
        columns = zip(
            found.counts, found.items.tolist(), found.sources.tolist(), evidence.tolist(), strict=True
        )
        return [list(zip(*rows, strict=True))[:count] for count, *rows in columns]

    def expected(self) -> list[Listed]:
        ends = np.cumsum(self.histories.lengths).tolist()
        starts = [0, *ends[:-1]]
        return [self._of(user, slice(*span)) for user, span in enumerate(zip(starts, ends, strict=True))]

    def _of(self, user: int, events: slice) -> Listed:
        of_source = self._rows(user, events)
        score: dict[int, int] = defaultdict(int)
        most: dict[int, int] = defaultdict(int)
        evidence: dict[int, float] = defaultdict(float)
        for source, item, weight in of_source:
            whole = int(weight * np.float32(2**20)) * 8 + 7 - source
            score[item] += whole
            most[item] = max(most[item], whole)
            evidence[item] += self._share(source) * (whole >> 3) / 2**30
        explicit = self.explicit[user]
        if explicit is not None:
            kept = [item for item in dict.fromkeys(explicit) if item not in self.exclude[user]]
            return [(item, REQUEST, evidence[item]) for item in kept]
        vetoed = set(self.exclude[user])
        for item, behavior in zip(
            self.histories.items[events], self.histories.behaviors[events], strict=True
        ):
            if self.settings.seen_filter == "seen" or (self.settings.seen_filter, behavior) == (
                "bought",
                BUY,
            ):
                vetoed.add(int(item))
        listed: Listed = []
        taken: Counter[int] = Counter()
        for item in sorted(score.keys() - vetoed, key=lambda item: (-score[item], item)):
            category = int(self.category_of_item[item])
            taken[category] += 1
            if category < 0 or taken[category] <= self.settings.category_cap:
                listed.append((item, 7 - most[item] % 8, evidence[item]))
        return listed[: self.settings.candidate_limit]

    def _rows(self, user: int, events: slice) -> list[tuple[int, int, np.float32]]:
        rows: list[tuple[int, int, np.float32]] = []

        def add(source: int, of: ItemWeights, factor: float | np.float32) -> None:
            weighed = of.weights * np.float32(factor)
            rows.extend(
                (source, item, weight) for item, weight in zip(of.items.tolist(), weighed, strict=True)
            )

        newest = self.histories.items[events][::-1].tolist()
        categories = self.histories.categories[events][::-1][: self.settings.transition_events].tolist()
        ones = np.ones(1, np.float32)
        for back, item in enumerate(newest[: self.settings.recent_events]):
            factor = np.float32(4) * np.power(0.97, np.arange(100), dtype=np.float32)[back]
            add(RECENT, ItemWeights(np.array([item]), ones), factor)
        for back, of in enumerate(self.counts.transitions(newest[: self.settings.transition_events])):
            add(TRANSITION, of, np.float32(12) * np.power(0.8, np.arange(100), dtype=np.float32)[back])
        distinct = list(dict.fromkeys(categories))[: self.settings.recent_categories]
        for back, of in enumerate(self.counts.categories(distinct)):
            add(CATEGORY, of, 0.5 * 0.7**back)
        add(POPULAR, self.counts.most, 0.1)
        ids, scores = (column[user] for column in self.retrieved)
        good = (ids >= 0) & np.isfinite(scores)
        if good.any() and (newest or not len(self.counts.most)):
            scaled = (scores[good] - scores[good].min()) / max(np.ptp(scores[good]), np.float32(1e-6))
            add(RETRIEVAL, ItemWeights(ids[good], scaled), 4.0)
        return rows

    def _share(self, source: int) -> float:
        if self.fusion is None or source == RETRIEVAL:
            return 0.0
        fusion = self.fusion
        weight = {
            TRANSITION: fusion.transition / 12.0,
            RECENT: fusion.recent / 4.0,
            CATEGORY: fusion.category / 0.5,
            POPULAR: fusion.popular / np.float32(0.1),
        }[source]
        return round(float(weight) * 1024)


def world(seed: int) -> World:
    """Histories of very different length, none among them; ids from 0; lists that overlap."""
    rng = np.random.default_rng(seed)
    users = int(rng.choice([1, 1, 2, 5, 20]))
    even = rng.random() < 0.3
    lengths = np.full(users, 100) if even else rng.integers(0, 101, users) * (rng.random(users) < 0.8)
    events = int(lengths.sum())

    def some(most: int) -> ItemWeights:
        count = int(rng.integers(0, most + 1))
        weights = -np.sort(-rng.random(count, dtype=np.float32))
        return ItemWeights(rng.choice(ITEMS, count, replace=False), weights)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, ITEMS, int(rng.integers(0, most))).tolist())

    retrieved = np.array([rng.choice(ITEMS, 30, replace=False) for _ in range(users)])
    scores = -np.sort(-rng.normal(size=retrieved.shape).astype(np.float32), axis=1)
    if rng.random() < 0.4:
        retrieved[rng.random(retrieved.shape) < 0.1] = -1
        scores[rng.random(scores.shape) < 0.1] = np.nan
        retrieved[0] = -1
    asking = rng.choice([0.0, 0.3, 1.0])
    return World(
        SequenceBatch(
            lengths,
            rng.integers(0, ITEMS, events),
            rng.integers(0, CATEGORIES, events),
            rng.choice(4, events, p=(0.85, 0.05, 0.05, 0.05)),
            np.zeros(events, np.int64),
        ),
        Counts(
            {item: some(32) for item in range(0, ITEMS, 2)},
            {category: some(48) for category in range(0, CATEGORIES, 2)},
            some(60),
        ),
        (retrieved, scores),
        [ids(6) for _ in range(users)],
        [ids(70) if rng.random() < asking else None for _ in range(users)],
        rng.integers(-1, CATEGORIES, ITEMS, dtype=np.int32),
        FeatureSettings(
            candidate_limit=int(rng.choice([1, 50, 300])),
            category_cap=int(rng.choice([2, 5, 20])),
            seen_filter=rng.choice(["none", "bought", "seen"]),
            recent_events=int(rng.choice([0, 7, 100])),
            transition_events=int(rng.choice([0, 10])),
        ),
        Fusion(transition=3.0, recent=0.7, category=1.5, popular=0.25) if rng.random() < 0.7 else None,
    )


@pytest.mark.parametrize("seeds", [range(start, start + 25) for start in range(0, 100, 25)])
def test_candidates_of_random_batches_are_those_of_the_plain_reference(seeds: range) -> None:
    some_named = some_capped = False
    for seed in seeds:
        made = world(seed)
        found, expected = made.found(), made.expected()
        for ours, theirs in zip(found, expected, strict=True):
            assert [row[:2] for row in ours] == [row[:2] for row in theirs], seed
            assert [row[2] for row in ours] == pytest.approx([row[2] for row in theirs], rel=1e-6), seed
        some_named |= any(given is not None for given in made.explicit)
        some_capped |= made.settings.category_cap < made.settings.candidate_limit
    assert some_named
    assert some_capped
