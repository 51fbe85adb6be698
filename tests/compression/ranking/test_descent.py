"""Large tables learn by the rows that a step looks up."""

import pytest
import torch

from compression.ranking.descent import Effort
from compression.ranking.training import fit
from compression.ranking.weights import untrained
from compression.smaller.quantization import Grid, aware
from compression.training.checkpoint import Checkpoints
from compression.training.optimizer import MAX_NORM, clip
from infra.bench.table1.shapes import QUICK
from infra.bench.table1.steps import data

SAMPLED = Effort(epochs=99.0, max_steps=60, learning_rate=5e-3, negatives=64, full_softmax_items=0)


@pytest.fixture(scope="module")
def log():
    return data(QUICK, 1)


def begun(log, seed=1):
    return untrained(QUICK.config(log.vocabulary.item_rows), seed)


def test_a_large_table_learns_only_in_the_rows_that_were_looked_up(log):
    ranker = begun(log)
    before = log.judge(ranker)["hr@50"]
    table = ranker.network.items.weight.detach().clone()
    looked_up = set()
    ranker.network.items.register_forward_hook(
        lambda _, given, __: looked_up.update(given[0].unique().tolist())
    )
    fit(ranker, log, Effort(epochs=99.0, max_steps=1, negatives=8, full_softmax_items=0, batch_windows=1))
    moved = (ranker.network.items.weight != table).any(1).nonzero().flatten().tolist()
    assert moved and set(moved) <= looked_up - {0} and len(looked_up) < len(table) / 2
    assert fit(ranker, log, SAMPLED) == 60
    assert log.judge(ranker)["hr@50"] > 2 * before
    assert not ranker.network.items.sparse


def test_what_is_taught_by_rows_is_taken_up_again_after_a_kill(log, tmp_path):
    class Killed(Exception):
        pass

    def stop():
        raise Killed

    teacher, whole, again = begun(log, 3), begun(log), begun(log)
    fit(whole, log, SAMPLED, teacher=teacher)
    taken = []
    kept = Checkpoints(tmp_path, "one", every_s=0.0)
    with pytest.raises(Killed):
        fit(
            again,
            log,
            SAMPLED,
            teacher=teacher,
            after_step=lambda: stop() if len(taken) == 40 else taken.append(1),
            checkpoints=kept,
        )
    other = begun(log, 2)
    fit(other, log, SAMPLED, teacher=teacher, checkpoints=Checkpoints(tmp_path, "one", every_s=0.0))
    for one, same in zip(whole.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.allclose(one, same, atol=1e-4)


def test_negatives_of_a_table_that_is_being_rounded_are_rounded_too(log):
    ranker = begun(log)
    with aware(ranker, {"network.items": Grid(2, per_row=True)}):
        # A step of 1e-9 changes nothing that can be seen: what is learnt is learnt of rounded rows alone.
        seen = []
        ranker.network.items.register_forward_hook(
            lambda _, __, rows: seen.append(max(len(row.unique()) for row in rows.flatten(0, -2)))
        )
        fit(ranker, log, Effort(max_steps=1, learning_rate=1e-9, full_softmax_items=0, negatives=8))
    assert len(seen) >= 2 and max(seen) <= 2**2


def test_sparse_and_dense_gradients_are_made_smaller_alike():
    for by_rows in (False, True):
        table = torch.nn.Embedding(6, 2, sparse=by_rows)
        other = torch.nn.Parameter(torch.ones(3))
        loss = 30 * table(torch.tensor([1, 1, 4])).sum() + 40 * other.sum()
        torch.autograd.backward(loss)
        clip([table.weight, other], table.weight if by_rows else None)
        of_table = table.weight.grad.to_dense() if by_rows else table.weight.grad
        norm = float(torch.cat([of_table.flatten(), other.grad]).norm())
        assert norm == pytest.approx(MAX_NORM, rel=1e-4)
        assert float(of_table[1, 0] / other.grad[0]) == pytest.approx(60 / 40)
