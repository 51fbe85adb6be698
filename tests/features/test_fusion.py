"""What the statistics add to the scores of candidates."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from features.candidate_rows import Candidates
from features.candidates import find_candidates
from features.fusion import Fusion
from tests.features.test_candidates import SETTINGS, histories, lists, settings, statistics

FUSION = Fusion(transition=6.0, recent=2.0, category=3.0, popular=1.5)


def evidence(found: Candidates, user: int = 0) -> dict[int, float]:
    assert found.evidence is not None
    count = found.counts[user]
    return dict(zip(found.items[user, :count].tolist(), found.evidence[user, :count].tolist(), strict=True))


def test_evidence_is_the_sum_over_the_sources_of_weight_times_what_is_counted() -> None:
    known = statistics(transitions={2: [20, 21], 1: [20]}, categories={8: [80, 20]}, popular=[90, 20])
    found = find_candidates(histories([(1, 7), (2, 8), (1, 7)]), known, settings=SETTINGS, fusion=FUSION)
    after_1, after_2 = known.transitions([1, 2])
    share = {(1, 20): after_1.weights[0], (2, 20): after_2.weights[0], (2, 21): after_2.weights[1]}
    assert evidence(found) == pytest.approx(
        {
            1: 2.0 * (1.0 + 0.97**2),
            2: 2.0 * 0.97,
            20: 6.0 * (share[1, 20] * (1 + 0.8**2) + share[2, 20] * 0.8) + 3.0 * 0.7 * 0.5 + 1.5 * 0.5,
            21: 6.0 * share[2, 21] * 0.8,
            80: 3.0 * 0.7,
            90: 1.5,
        },
        abs=0.02,
    )


def test_without_a_fusion_there_is_no_evidence_and_with_one_the_candidates_are_the_same() -> None:
    known = statistics(transitions={2: [20, 21]}, popular=[90])
    asked = histories([(1, 7), (2, 8)], [(2, 8)])
    plain = find_candidates(asked, known, settings=SETTINGS)
    fused = find_candidates(asked, known, settings=SETTINGS, fusion=FUSION)
    nothing = find_candidates(asked, known, settings=SETTINGS, fusion=Fusion())
    assert plain.evidence is None and nothing.evidence is None
    assert lists(plain) == lists(fused) == lists(nothing)
    assert np.array_equal(plain.sources, fused.sources)


def test_evidence_does_not_depend_on_who_else_is_in_the_batch() -> None:
    rng = np.random.default_rng(3)
    pasts = [[(int(i), int(i) % 7) for i in rng.integers(1, 60, length)] for length in (1, 90, 5, 33, 2)]
    after = {item: rng.permutation(60)[:20].tolist() for item in range(60)}
    known = statistics(
        transitions=after, categories={c: [c, c + 7, c + 14] for c in range(7)}, popular=[3, 9]
    )
    together = find_candidates(histories(*pasts), known, settings=SETTINGS, fusion=FUSION)
    for user, past in enumerate(pasts):
        alone = find_candidates(histories(past), known, settings=SETTINGS, fusion=FUSION)
        assert evidence(alone) == evidence(together, user)


def test_candidates_asked_for_by_name_have_the_evidence_they_would_have_if_found() -> None:
    known = statistics(transitions={2: [20, 21], 5: [21, 1]}, categories={8: [80]}, popular=[90, 20])
    pasts = [[(1, 7), (2, 8)], [(5, 8), (5, 8)], [(2, 8)]]
    found = find_candidates(histories(*pasts), known, settings=SETTINGS, fusion=FUSION)
    names = (21, 90, 12345, 1, 5, 80, 2**62, 20)
    everybody = find_candidates(
        histories(*pasts), known, explicit=[names] * 3, settings=SETTINGS, fusion=FUSION
    )
    some = find_candidates(
        histories(*pasts), known, explicit=[names, None, names[:3]], settings=SETTINGS, fusion=FUSION
    )
    for user in range(3):
        expected = {name: evidence(found, user).get(name, 0.0) for name in names}
        assert evidence(everybody, user) == expected
        if user != 1:
            assert evidence(some, user) == {name: expected[name] for name in evidence(some, user)}
    assert evidence(some, 1) == evidence(found, 1)
    assert len(evidence(some, 2)) == 3


def test_a_bought_item_that_is_asked_for_keeps_its_evidence() -> None:
    past = histories([(1, 7, "buy"), (2, 8)])
    known = statistics(transitions={2: [1]})
    found = find_candidates(past, known, settings=SETTINGS, fusion=FUSION)
    asked = find_candidates(past, known, explicit=[[1]], settings=SETTINGS, fusion=FUSION)
    allowed = find_candidates(past, known, settings=settings(seen_filter="none"), fusion=FUSION)
    assert 1 not in evidence(found)
    assert evidence(asked) == {1: evidence(allowed)[1]}


def test_nobody_and_nothing_to_go_by_have_no_evidence() -> None:
    assert len(find_candidates(histories(), statistics(), settings=SETTINGS, fusion=FUSION).counts) == 0
    newcomer = find_candidates(histories([]), statistics(), settings=SETTINGS, fusion=FUSION)
    assert newcomer.counts.tolist() == [0]
    asked = find_candidates(histories([]), statistics(), explicit=[[7, 8]], settings=SETTINGS, fusion=FUSION)
    assert evidence(asked) == {7: 0.0, 8: 0.0}


def test_weights_are_bounded_and_scaled_together() -> None:
    assert not Fusion()
    assert not FUSION.times(0.0)
    assert FUSION.times(0.5) == Fusion(transition=3.0, recent=1.0, category=1.5, popular=0.75)
    assert FUSION.times(1e6).transition == 1_000.0
    for wrong in (-1.0, float("nan"), float("inf"), 1_001.0):
        with pytest.raises(ValidationError):
            Fusion(transition=wrong)
