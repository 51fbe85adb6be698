"""What a collector's lists are counted as."""

from __future__ import annotations

import numpy as np

from infra.bench.load import Account, Collected


def _collected(*lists: tuple[int, str, int]) -> Collected:
    """Lists as they came: (click, id, degraded)."""
    clicks, ids, degraded = zip(*lists, strict=True)
    nothing = np.zeros(len(lists))
    return Collected(
        clicks=np.array(clicks).astype(np.str_),
        arrived_s=np.arange(len(lists), dtype=float),
        ids=np.array(ids),
        degraded=np.array(degraded, dtype=np.int8),
        wait_ms=nothing,
        rank_ms=nothing,
    )


def test_a_degraded_list_before_the_ranked_one_is_not_ranked_again():
    account = Account.of(2, _collected((0, "a", 1), (0, "a", 0), (1, "b", 0)))
    assert (account.lost, account.duplicated, account.ranked_again, account.other_ids) == (0, 1, 0, 0)


def test_a_second_ranked_list_is_counted_and_so_is_one_under_another_id():
    account = Account.of(3, _collected((0, "a", 0), (0, "a", 0), (1, "b", 0), (1, "c", 0), (1, "b", 2)))
    assert (account.lost, account.duplicated, account.ranked_again, account.other_ids) == (1, 3, 2, 1)
