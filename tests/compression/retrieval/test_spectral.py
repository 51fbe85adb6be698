"""A table that starts from counts: its arithmetic, and items that met lie near each other before training."""

import numpy as np
import pytest
from scipy import sparse

from compression.evaluation.predictors import Statistics
from compression.evaluation.transitions import SPARSE
from compression.retrieval.network import RetrievalNetwork
from compression.retrieval.recipe import change
from compression.retrieval.spectral import STD, association, factors, start_table
from compression.retrieval.trainer import train
from tests.compression.retrieval.worlds import RECIPE, parts, write


def test_association_is_positive_mutual_information_with_smoothed_contexts():
    counts = sparse.csr_matrix(np.array([[0, 3, 0], [0, 0, 1], [0, 0, 0]], np.float32))
    both = np.array([[0, 3, 0], [3, 0, 1], [0, 1, 0]], np.float64)
    often = both.sum(1)
    with np.errstate(divide="ignore"):
        expected = np.log(both * (often**0.75).sum() / np.outer(often, often**0.75))
    assert association(counts).toarray() == pytest.approx(np.maximum(expected, 0))


def test_factors_give_a_symmetric_matrix_of_low_rank_back():
    rows = np.random.default_rng(2).normal(size=(12, 3))
    table = factors(sparse.csr_matrix(rows @ rows.T), 3, np.random.default_rng(1))
    assert table @ table.T == pytest.approx(rows @ rows.T)
    wider = factors(sparse.csr_matrix(rows @ rows.T), 20, np.random.default_rng(1))
    assert wider.shape == (12, 20)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return parts(write(tmp_path_factory.mktemp("log")))


def test_items_that_follow_each_other_start_near_each_other(world):
    sequences, split, vocabulary = world
    statistics = Statistics(sequences, split, vocabulary)
    network = RetrievalNetwork(RECIPE.network(vocabulary.item_rows))
    start_table(network, statistics, SPARSE, seed=1)
    table = network.items.weight.detach().numpy()
    assert not table[0].any()
    assert table[1 : statistics.known_items + 1].std() == pytest.approx(STD, rel=0.05)
    table = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)
    at = statistics.trained[:-1]
    near = (table[statistics.rows[at]] * table[statistics.rows[at + 1]]).sum(1).mean()
    drawn = np.random.default_rng(1).permutation(at)
    assert near > (table[statistics.rows[at]] * table[statistics.rows[drawn]]).sum(1).mean() + 0.1


def test_a_training_that_starts_from_counts_is_ahead_after_an_epoch(world):
    begun = [
        train(*world, change(RECIPE, {"start": start, "epochs": 1, "learning_rate": 1e-3}, "test"), seed=1)
        for start in ("normal", "counts")
    ]
    drawn, counted = (one.epochs[0].verdict.alone for one in begun)
    assert counted > 1.2 * drawn
