"""Ranks become figures, and a loss a share with an interval."""

import numpy as np
import pytest

from compression.errors import ArtefactInvalid
from compression.ranking.judging import Ranks, losses


def _ranks(seed, worse=0.0):
    rng = np.random.default_rng(seed)
    over = rng.integers(1, 200, 2_000).astype(np.float64)
    return Ranks(np.round(over * (1 + worse)), rng.integers(1, 51, 2_000).astype(np.float64))


def test_the_means_of_the_gains_are_the_metrics():
    ranks = _ranks(1)
    for name, value in ranks.metrics().items():
        assert ranks.gains(name).mean() == pytest.approx(value, abs=1e-5)


def test_a_loss_is_a_share_of_the_bases_and_its_interval_holds_it():
    base = _ranks(1)
    lost = losses(_ranks(1, worse=0.2), base, ["ndcg@50", "within_mrr"])
    share = 1 - _ranks(1, worse=0.2).metrics()["ndcg@50"] / base.metrics()["ndcg@50"]
    assert lost["ndcg@50"]["loss"] == pytest.approx(share, abs=1e-3) and share > 0.05
    assert 0 < lost["ndcg@50"]["low"] < lost["ndcg@50"]["loss"] < lost["ndcg@50"]["high"]
    assert lost["within_mrr"] == {"loss": 0.0, "low": 0.0, "high": 0.0}


def test_what_is_as_good_by_chance_has_an_interval_around_nothing():
    lost = losses(_ranks(2), _ranks(1), ["ndcg@50"])["ndcg@50"]
    assert lost["low"] < 0 < lost["high"]


def test_ranks_are_kept_on_disk(tmp_path):
    ranks = _ranks(1)
    ranks.save(tmp_path / "a.ranks")
    again = Ranks.load(tmp_path / "a.ranks")
    assert np.array_equal(again.over, ranks.over) and np.array_equal(again.within, ranks.within)
    (tmp_path / "a.ranks").write_bytes(b"\0" * 24)
    with pytest.raises(ArtefactInvalid):
        Ranks.load(tmp_path / "a.ranks")
