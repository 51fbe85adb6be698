"""Scores of a list are the network's and the online counts' together."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compression.releases.registry import MANIFEST, Registry
from features.fusion import Fusion
from features.memory_store import MemoryStore
from features.statistics import ItemStatistics
from features.store import Append
from inference.types import RankedList, RankRequest
from tests.inference.conftest import ITEMS, NOW_S, sequence
from tests.inference.test_ranker import SETTINGS, Opened, lists

# The network of these tests is random: what is counted has to outweigh what it says.
FUSION = Fusion(transition=60.0, recent=0.5, category=0.25, popular=1.0)
FRESH = 999_983
Version = Callable[..., Opened]


def published(root: Path, registry: Registry, fusion: Fusion | None) -> Path:
    """The tests' version once more, with this in its manifest."""
    artefact = registry.open()
    staging = root / "staging"
    shutil.copytree(artefact.path, staging)
    for file in (MANIFEST, "manifest.sig"):
        (staging / file).unlink(missing_ok=True)
    copied = Registry(root / "models")
    copied.publish(staging, artefact.manifest.model_copy(update={"fusion": fusion}))
    copied.promote(artefact.version)
    return copied.root


@pytest.fixture
def version(registry: Registry, tmp_path: Path) -> Iterator[Version]:
    made: list[Opened] = []

    def make(chosen: Fusion | None, **settings: Any) -> Opened:
        root = published(tmp_path / str(len(made)), registry, chosen)
        made.append(Opened(root, SETTINGS.model_copy(update=settings)))
        return made[-1]

    yield make
    for opened in made:
        opened.close()


def counted(*pairs: tuple[int, int]) -> ItemStatistics:
    """Statistics of users who clicked on one item and then on another."""
    return asyncio.run(_count(pairs))


async def _count(pairs: Sequence[tuple[int, int]]) -> ItemStatistics:
    store = MemoryStore()
    statistics = ItemStatistics(store)
    for user, pair in enumerate(pairs):
        for place, item in enumerate(pair):
            appends = [Append(user, item, 50, 0, NOW_S + place, 1, 0, 2 * user + place)]
            statistics.needed(appends)
            appended, _ = await store.append(appends)
            statistics.observe(appends, appended)
    await statistics.flush()
    await statistics.refresh()
    asked = sorted({first for first, _ in pairs})
    names = [f"t:{{{item}}}" for item in asked]
    statistics.absorb(names, await store.neighbours(names, statistics.limit))
    return statistics


def by_item(answer: RankedList) -> dict[int, float]:
    return dict(zip(answer.items, answer.scores, strict=True))


def test_an_item_that_came_after_training_and_follows_another_leads_the_list(version: Version) -> None:
    clicked = int(ITEMS[7])
    request = RankRequest(1, sequence([int(ITEMS[3]), clicked]), k=50)
    knows_little = counted((clicked, int(ITEMS[9])))
    statistics = counted(*[(clicked, FRESH)] * 12, (clicked, int(ITEMS[9])))
    fused = version(FUSION)
    (before,) = lists(fused.rank([request], knows_little))
    (after,) = lists(fused.rank([request], statistics))
    assert FRESH not in before.items
    assert after.items[0] == FRESH
    # Its score is what its hash bucket has from the network, and what was counted.
    (of_network,) = lists(version(None).rank([request], statistics))
    share = dict(zip(*map(np.ndarray.tolist, _columns(statistics, clicked)), strict=True))[FRESH]
    popular = dict(zip(statistics.popular().items.tolist(), statistics.popular().weights, strict=True))[FRESH]
    # 50 is the category of these clicks and not of the history: nothing comes from there.
    expected = by_item(of_network)[FRESH] + 60.0 * share + 1.0 * popular
    assert by_item(after)[FRESH] == pytest.approx(expected, abs=1e-3)


def _columns(statistics: ItemStatistics, item: int) -> tuple[Any, Any]:
    (after,) = statistics.transitions([item])
    return after.items, after.weights


def test_a_manifest_without_a_fusion_and_one_that_is_turned_off_serve_as_before(
    version: Version,
) -> None:
    statistics = counted(*[(int(ITEMS[7]), int(ITEMS[200]))] * 9)
    requests = [RankRequest(1, sequence(ITEMS[[3, 7]].tolist()), k=50), RankRequest(2, None, k=50)]
    plain = lists(version(None).rank(requests, statistics))
    off = lists(version(FUSION, fusion=0.0).rank(requests, statistics))
    half = lists(version(FUSION, fusion=0.5).rank(requests, statistics))
    whole = lists(version(FUSION).rank(requests, statistics))
    for one, other in zip(plain, off, strict=True):
        assert (one.items, one.scores, one.sources) == (other.items, other.scores, other.sources)
    added = {item: score - by_item(plain[0])[item] for item, score in by_item(whole[0]).items()}
    assert added[int(ITEMS[200])] > 1.0
    for item, score in by_item(half[0]).items():
        assert score - by_item(plain[0])[item] == pytest.approx(added[item] / 2, abs=1e-3)
    assert whole[0].scores == sorted(whole[0].scores, reverse=True)


def test_a_history_that_the_cache_knows_has_the_evidence_of_now(version: Version) -> None:
    clicked = int(ITEMS[7])
    request = RankRequest(1, sequence([int(ITEMS[3]), clicked]), k=50)
    fused = version(FUSION)
    few = counted((clicked, int(ITEMS[9])))
    (first,) = lists(fused.rank([request], few))
    (again,) = lists(fused.rank([request], few))
    assert by_item(again) == by_item(first)
    (later,) = lists(fused.rank([request], counted(*[(clicked, int(ITEMS[9]))] * 20)))
    assert by_item(later)[int(ITEMS[9])] > by_item(first)[int(ITEMS[9])] + 1.0


def test_candidates_by_name_are_fused_in_one_graph_as_in_two_and_alone_as_together(
    version: Version,
) -> None:
    clicked = int(ITEMS[7])
    statistics = counted(*[(clicked, FRESH)] * 5)
    asked = (FRESH, *ITEMS[:30].tolist())
    pasts = ([3, 7], [7], [7, 5, 9, 11, 7], [])
    requests = [
        RankRequest(user, sequence(ITEMS[past].tolist()) if past else None, k=50, candidates=asked)
        for user, past in enumerate(pasts)
    ]
    fused = version(FUSION)
    together = lists(fused.rank(requests, statistics))
    at_once = lists(version(FUSION, cache_mb=0.0).rank(requests, statistics))
    mixed = lists(fused.rank([*requests, RankRequest(9, sequence([clicked]), k=50)], statistics))
    plain = lists(version(None).rank(requests, statistics))
    for place, request in enumerate(requests):
        (alone,) = lists(fused.rank([request], statistics))
        for other in (alone, at_once[place], mixed[place]):
            assert by_item(other) == pytest.approx(by_item(together[place]), abs=1e-4)
    gained = [by_item(one)[FRESH] - by_item(other)[FRESH] for one, other in zip(together, plain, strict=True)]
    assert gained[0] == pytest.approx(gained[1], abs=1e-4)
    assert gained[0] > 1.0
    assert mixed[-1].items[0] == FRESH
