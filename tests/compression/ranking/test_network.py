"""Candidates after one copy of the history or after a copy each: the same scores; and nobody sees what
they must not."""

import numpy as np
import pytest
import torch
from torch import nn

from compression.attention.variants import (
    depthwise_separable,
    eight_bits,
    grouped_projections,
    hybrid_sparse,
    low_rank_heads,
)
from compression.ranking import graph
from compression.smaller.quantization import Grid, aware
from compression.training.model import History
from tests.compression.rankers import history, ranker, scores

CANDIDATES = torch.randint(1, 80, (3, 12), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("variant", [None, grouped_projections(2), low_rank_heads(2)])
def test_a_copy_of_the_history_for_each_candidate_changes_no_score(variant):
    made, given = ranker(**({"attention": variant.build} if variant else {})), history([1, 17, 30], 30)
    together = scores(made, given, CANDIDATES)
    copies = History(*(column.repeat_interleave(12, 0) for column in given))
    apart = scores(made, copies, CANDIDATES.reshape(-1, 1)).view(3, 12)
    assert torch.allclose(together, apart, atol=1e-5)
    assert float(together.std()) > 0.1


def test_candidates_do_not_see_one_another_nor_events_beyond_what_they_may():
    made, given = ranker(), history([30], 30)
    asked, seen = CANDIDATES[:1], torch.full((1, 12), 20)
    changed = History(*(column.clone() for column in given))
    changed.items[0, 20:] = 7
    others = asked.clone()
    others[0, 6:] = 9
    with torch.no_grad():
        users, one, _ = made(given, asked, seen)
        _, other, _ = made(changed, others, seen)
        _, more, _ = made(given, asked, seen + 1)
    assert torch.allclose(one[:, :6], other[:, :6], atol=1e-5)
    assert not torch.allclose(one, more, atol=1e-3)
    assert torch.allclose(users, made.network(given), atol=1e-5)


def test_attention_that_maps_events_together_is_refused():
    for variant in (depthwise_separable(3), hybrid_sparse(4)):
        with pytest.raises(ValueError, match="apart"):
            ranker(attention=variant.build)


def run(model, given, asked):
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {"items": given.items[0].numpy().astype(np.int32), "candidates": asked.numpy().astype(np.int32)}
    return torch.from_numpy(session.run(["scores"], feed)[0])


@pytest.mark.parametrize("form", graph.FORMS)
def test_the_graphs_answer_as_the_network(form):
    made, given = ranker(layers=3), history([30], 30)
    model = graph.graph(made, form, events=30, candidates=12)
    assert torch.allclose(run(model, given, CANDIDATES[0]), scores(made, given, CANDIDATES[:1])[0], atol=1e-4)


@pytest.mark.parametrize("form", graph.FORMS)
@pytest.mark.parametrize("table", [Grid(8, per_row=True), Grid(4, per_row=True)])
def test_graphs_of_codes_answer_nearly_as_the_rounded_network(form, table):
    made, given = ranker(dim=32, ffn=64), history([30], 30)
    maps = (name for name, module in made.network.layers.named_modules() if isinstance(module, nn.Linear))
    chosen = {f"network.layers.{name}": Grid(8, per_row=True) for name in maps} | {"network.items": table}
    model = graph.graph(made, form, events=30, candidates=12, grids=chosen)
    assert sum(node.op_type == "MatMulInteger" for node in model.graph.node) == 12
    with aware(made, chosen):
        pass
    expected, found = scores(made, given, CANDIDATES[:1])[0], run(model, given, CANDIDATES[0])
    # The rest is the rounding of activations to 8 bits, a step for a whole tensor.
    assert float((found - expected).abs().max()) < 0.1 * float(expected.std())


def test_a_codes_graph_is_smaller_by_its_table():
    made = ranker(item_rows=5000)
    whole, coded = (
        len(graph.graph(made, "shared history", events=30, candidates=5, grids=g).SerializeToString())
        for g in (None, {"network.items": Grid(8, per_row=True)})
    )
    table = 5000 * 16 * 4
    assert whole - coded > 0.4 * table  # a row of 16 codes has 8 bytes of step and offset


def test_int8_attention_ranks_too():
    made, given = ranker(attention=eight_bits().build), history([30], 30)
    assert bool(torch.isfinite(scores(made, given, CANDIDATES[:1])).all())


def test_a_map_whose_rows_have_one_sign_is_written_all_the_same():
    made, given = ranker(), history([30], 30)
    with torch.no_grad():
        made.layers[0].ffn.widen.weight.abs_().add_(1.0)
    chosen = {"network.layers.0.ffn.widen": Grid(8, per_row=True)}
    model = graph.graph(made, "shared history", events=30, candidates=12, grids=chosen)
    with aware(made, chosen):
        pass
    assert torch.allclose(run(model, given, CANDIDATES[0]), scores(made, given, CANDIDATES[:1])[0], atol=1e-3)
