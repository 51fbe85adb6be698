from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from features.candidate_rows import SOURCES, Candidates
from features.candidates import find_candidates
from features.memory_store import MemoryStore
from features.sequence import NARROW, SequenceBatch, pack_event, pack_fence, unpack
from features.settings import FeatureSettings
from features.statistics import ItemStatistics, ItemWeights
from features.store import Append, Neighbours
from topics.messages import BEHAVIORS, Source

START_S = 1_511_539_200
SETTINGS = FeatureSettings()
Past = Sequence[tuple[int, int] | tuple[int, int, str]]


def histories(*pasts: Past) -> SequenceBatch:
    """Per user (item, category) or (item, category, behaviour), oldest first."""
    values = []
    for past in pasts:
        events = [(*event, "pv")[:3] for event in past]
        body = b"".join(
            pack_event(item, category, BEHAVIORS.index(behavior), START_S + at)
            for at, (item, category, behavior) in enumerate(events)
        )
        wide = any(len(pack_event(item, category, 0, 0)) == 24 for item, category, _ in events)
        assert not wide or all(len(pack_event(i, c, 0, 0)) == 24 for i, c, _ in events)
        values.append(bytes((2 if wide else NARROW, 1)) + pack_fence(1, 0, len(events)) + body)
    return unpack([value if past else None for value, past in zip(values, pasts, strict=True)])


def statistics(
    *,
    transitions: dict[int, list[int]] | None = None,
    categories: dict[int, list[int]] | None = None,
    popular: Sequence[int] = (),
) -> ItemStatistics:
    """Lists heaviest first, each item half as heavy as the one before."""
    made = ItemStatistics(MemoryStore(), settings=SETTINGS)
    made.needed([Append(0, 0, 0, 0, START_S, 0, 0, 0)])
    for names, kind in ((transitions, "t"), (categories, "c")):
        for id_, items in (names or {}).items():
            base = START_S / SETTINGS.transition_half_life_s
            made.absorb([f"{kind}:{{{id_}}}"], [halving(items, base)])
    if popular:
        made._popular = ItemWeights(
            items=np.array(popular, np.int64), weights=np.exp2(-np.arange(len(popular))).astype(np.float32)
        )
    return made


def halving(items: Sequence[int], base: float) -> Neighbours:
    return Neighbours(np.array(items, np.int64), base + 8.0 - np.arange(len(items)))


def lists(found: Candidates) -> list[list[int]]:
    return [row[:count].tolist() for row, count in zip(found.items, found.counts, strict=True)]


def sources(found: Candidates, user: int = 0) -> dict[int, Source]:
    count = found.counts[user]
    named = [SOURCES[code] for code in found.sources[user, :count]]
    return dict(zip(found.items[user, :count].tolist(), named, strict=True))


def settings(**changes: object) -> FeatureSettings:
    return SETTINGS.model_copy(update=changes)


def test_every_source_contributes_and_is_named() -> None:
    found = find_candidates(
        histories([(1, 7), (2, 8)]),
        statistics(transitions={2: [20, 21]}, categories={8: [80]}, popular=[90]),
        retrieved=(np.array([[70, 71]]), np.array([[0.5, 0.25]], np.float32)),
        settings=SETTINGS,
    )
    assert sources(found) == {
        1: "recent",
        2: "recent",
        20: "transition",
        21: "transition",
        70: "retrieval",
        71: "retrieval",
        80: "category",
        90: "popular",
    }


def test_an_item_of_several_sources_comes_once_with_the_source_that_gave_most() -> None:
    found = find_candidates(
        histories([(5, 7), (2, 8)]),
        statistics(transitions={2: [20, 5]}, categories={8: [20, 90]}, popular=[90, 20]),
        settings=SETTINGS,
    )
    named = sources(found)
    assert sorted(named) == [2, 5, 20, 90]
    assert named[20] == "transition"
    assert named[90] == "category"
    assert lists(found)[0][0] == 20  # every source agrees on it


def test_a_revisited_item_comes_before_one_seen_once() -> None:
    found = find_candidates(histories([(1, 7), (1, 7), (1, 7), (2, 7)]), statistics(), settings=SETTINGS)
    assert lists(found) == [[1, 2]]


def test_later_events_count_more() -> None:
    found = find_candidates(
        histories([(1, 7), (2, 7), (3, 7)]),
        statistics(transitions={1: [10], 3: [30]}),
        settings=settings(recent_events=0),
    )
    assert lists(found) == [[30, 10]]


def test_users_do_not_see_each_others_candidates_whatever_the_batch() -> None:
    known = statistics(transitions={1: [10, 11], 2: [20]}, categories={7: [70, 71]}, popular=[90, 91])
    pasts: list[Past] = [[(1, 7), (2, 8)], [], [(2, 7)], [(3, 9, "buy"), (1, 7)], [(90, 9)]]
    together = find_candidates(histories(*pasts), known, settings=SETTINGS)
    for user, past in enumerate(pasts):
        alone = find_candidates(histories(past), known, settings=SETTINGS)
        assert lists(alone)[0] == lists(together)[user]
        assert sources(alone) == sources(together, user)


def test_a_user_without_history_gets_what_is_popular_in_order() -> None:
    found = find_candidates(
        histories([], [(1, 7)]),
        statistics(popular=[9, 3, 5]),
        retrieved=(np.array([[70], [70]]), np.ones((2, 1), np.float32)),
        settings=SETTINGS,
    )
    assert lists(found)[0] == [9, 3, 5]
    assert set(sources(found, 0).values()) == {"popular"}
    assert 70 in lists(found)[1]


def test_where_nothing_is_popular_yet_a_new_user_gets_what_the_model_finds() -> None:
    found = find_candidates(
        histories([]),
        statistics(),
        retrieved=(np.array([[70, 71]]), np.array([[0.1, 0.9]], np.float32)),
        settings=SETTINGS,
    )
    assert lists(found) == [[71, 70]]


def test_nothing_known_is_an_empty_list() -> None:
    found = find_candidates(histories([], []), statistics(), settings=SETTINGS)
    assert lists(found) == [[], []]
    assert found.items.shape == (2, 0)


def test_an_empty_batch_is_an_empty_answer() -> None:
    assert len(find_candidates(histories(), statistics(popular=[1]), settings=SETTINGS).counts) == 0


def test_no_more_than_the_limit_and_fewer_where_fewer_exist() -> None:
    found = find_candidates(
        histories([(item, 7) for item in range(1, 80)], [(1, 7)]),
        statistics(popular=range(100, 120)),
        settings=settings(candidate_limit=50),
    )
    assert found.counts.tolist() == [50, 21]
    assert found.items.shape == (2, 50)
    assert not found.items[1, 21:].any()


@pytest.mark.parametrize(
    ("seen_filter", "expected"), [("none", {1, 2, 3, 90}), ("bought", {1, 3, 90}), ("seen", {90})]
)
def test_the_seen_filter_says_which_past_items_may_come_back(seen_filter: str, expected: set[int]) -> None:
    found = find_candidates(
        histories([(2, 7, "buy"), (1, 7), (3, 7, "fav"), (2, 7, "pv")]),
        statistics(transitions={1: [2]}, popular=[2, 90]),
        retrieved=(np.array([[2]]), np.ones((1, 1), np.float32)),
        settings=settings(seen_filter=seen_filter),
    )
    assert set(lists(found)[0]) == expected


def test_excluded_items_are_left_out_for_their_user_only() -> None:
    found = find_candidates(
        histories([(1, 7)], [(1, 7)]),
        statistics(popular=[90, 91]),
        exclude=[[1, 91, 12345], []],
        settings=SETTINGS,
    )
    assert lists(found) == [[90], [1, 90, 91]]


def test_the_category_cap_keeps_the_best_of_each_category() -> None:
    found = find_candidates(
        histories([]),
        statistics(popular=[10, 11, 20, 12, 30, 13, 21]),
        category_of=lambda items: items // 10,
        settings=settings(category_cap=2),
    )
    assert lists(found) == [[10, 11, 20, 30, 21]]


def test_items_of_unknown_category_are_not_capped_together() -> None:
    found = find_candidates(
        histories([], []),
        statistics(popular=[10, 11, 12, 13, 14]),
        category_of=lambda items: np.where(items < 12, 1, -1),
        settings=settings(category_cap=1),
    )
    assert lists(found) == [[10, 12, 13, 14]] * 2


def test_the_cap_makes_room_for_others_before_the_limit_cuts() -> None:
    popular = [*range(100, 120), 200, 300]
    found = find_candidates(
        histories([]),
        statistics(popular=popular),
        category_of=lambda items: items // 100,
        settings=settings(category_cap=3, candidate_limit=5),
    )
    assert lists(found) == [[100, 101, 102, 200, 300]]


def test_explicit_candidates_are_ranked_as_given_and_nothing_else_is() -> None:
    given = [7, 9, 7, 1, 8]
    found = find_candidates(
        histories([(1, 7, "buy")], [(1, 7)], []),
        statistics(popular=[90, 91]),
        explicit=[given, None, []],
        exclude=[[8], [90], []],
        settings=settings(candidate_limit=2, seen_filter="seen"),
    )
    assert lists(found) == [[7, 9, 1], [91], []]
    assert set(sources(found, 0).values()) == {"request"}


def test_a_long_explicit_list_is_not_cut() -> None:
    given = list(range(1, 700))
    found = find_candidates(
        histories([], []), statistics(popular=[5]), explicit=[given, None], settings=SETTINGS
    )
    assert lists(found) == [given, [5]]


def test_the_model_may_find_fewer_than_it_was_asked_for() -> None:
    found = find_candidates(
        histories([(1, 7)], [(2, 7)]),
        statistics(),
        retrieved=(
            np.array([[70, -1], [-1, -1]]),
            np.array([[0.5, -np.inf], [-np.inf, np.nan]], np.float32),
        ),
        settings=SETTINGS,
    )
    assert lists(found) == [[1, 70], [2]] or lists(found) == [[70, 1], [2]]


def test_ids_too_large_to_share_a_word_with_the_user_give_the_same_candidates() -> None:
    shift = 2**63 - 1 - 1000
    pasts: list[Past] = [[(1, 7), (2, 8), (1, 7)], [(3, 7, "buy"), (2, 7)], [(5, 5)]]
    moved: list[Past] = [[(event[0] + shift, *event[1:]) for event in past] for past in pasts]  # type: ignore[misc]
    small = find_candidates(
        histories(*pasts), statistics(transitions={2: [20, 1]}, popular=[90, 3]), settings=SETTINGS
    )
    large = find_candidates(
        histories(*moved),
        statistics(transitions={2 + shift: [20 + shift, 1 + shift]}, popular=[90 + shift, 3 + shift]),
        settings=SETTINGS,
    )
    assert lists(large) == [[item + shift for item in row] for row in lists(small)]
    assert np.array_equal(large.sources, small.sources)


def test_hundreds_of_candidates_of_many_users_agree_with_a_plain_computation() -> None:
    rng = np.random.default_rng(5)
    pasts: list[Past] = [
        [(int(item), int(item) % 9) for item in rng.integers(1, 60, rng.integers(0, 100))] for _ in range(40)
    ]
    known = statistics(
        transitions={item: rng.permutation(np.arange(1, 300))[:30].tolist() for item in range(1, 60)},
        categories={category: rng.permutation(np.arange(1, 300))[:40].tolist() for category in range(9)},
        popular=rng.permutation(np.arange(1, 300))[:100].tolist(),
    )
    everything = find_candidates(histories(*pasts), known, settings=settings(candidate_limit=1000))
    for past, row in zip(pasts, lists(everything), strict=True):
        score = plain(past, known)
        assert sorted(row) == sorted(score)
        falling = [score[item] for item in row]
        assert all(a > b - 1e-4 for a, b in itertools.pairwise(falling))
    capped = find_candidates(
        histories(*pasts), known, category_of=lambda items: items % 13, settings=settings(category_cap=3)
    )
    for row, all_of_them in zip(lists(capped), lists(everything), strict=True):
        taken: Counter[int] = Counter()
        expected = [item for item in all_of_them if (taken.update([item % 13]), taken[item % 13] <= 3)[1]]
        assert row == expected[:50]
    assert everything.counts.max() > 200


def plain(past: Past, known: ItemStatistics) -> dict[int, float]:
    """The docstring of `features.candidates`, line by line."""
    score: dict[int, float] = {}

    def add(items: Sequence[int], weights: Sequence[float], factor: float) -> None:
        for item, weight in zip(items, weights, strict=True):
            score[item] = score.get(item, 0.0) + factor * weight

    newest = [event[0] for event in past][::-1]
    categories = list(dict.fromkeys([event[1] for event in past][::-1][:10]))[:3]
    for back, item in enumerate(newest):
        add([item], [4.0], 0.97**back)
    for back, one in enumerate(known.transitions(newest[:10])):
        add(one.items.tolist(), one.weights.tolist(), 12.0 * 0.8**back)
    for back, one in enumerate(known.categories(categories)):
        add(one.items.tolist(), one.weights.tolist(), 0.5 * 0.7**back)
    add(known.popular().items.tolist(), known.popular().weights.tolist(), 0.1)
    return score
