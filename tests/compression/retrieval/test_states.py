"""Events are appended to what a network without positions made of those before, in torch and as graphs."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch

from compression.evaluation.scoring import to_history
from compression.releases.registry import ModelShape
from compression.retrieval.export import export
from compression.retrieval.network import NetworkConfig, RetrievalNetwork
from compression.retrieval.parity import check_parity
from compression.retrieval.release import RetrievalConfig, shape_of
from compression.retrieval.retriever import Retriever, stand_in
from compression.training import export as ranking
from compression.training.export import ParityError
from compression.training.model import History
from features.encoding import Vocabulary
from tests.compression.worlds import histories, model

ITEMS, ROWS = 50, 60
SHAPES = [
    {},
    {"heads": 2, "layers": 1},
    {"heads": 2, "behaviors": True, "gaps": True, "lateness": True, "activation": "swiglu"},
    {"reach": False, "gaps": True},
    {"category_rows": 12, "lateness": True, "activation": "relu"},
]


def network(**changes):
    fields = {"dim": 16, "ffn": 24, "max_history": 40, "item_rows": ROWS, "positions": False}
    torch.manual_seed(5)
    made = RetrievalNetwork(NetworkConfig(**(fields | changes)))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        made.items.weight[0] = 0
        if made.categories is not None:
            made.categories.weight[0] = 0
            made.item_categories[1:] = torch.arange(1, ROWS) % 9 + 1
    stand_in([made], ITEMS)
    return made.eval()


@pytest.mark.parametrize("changes", SHAPES)
def test_events_appended_one_by_one_come_to_what_the_whole_history_does(changes):
    retriever = Retriever([network(**changes)])
    whole = histories([9, 4, 6], 12, item_rows=ROWS)
    with torch.inference_mode():
        encoded = retriever.encode(to_history(whole))
        torch.testing.assert_close(encoded.user_vector, retriever.user_vectors(to_history(whole)))
        states = [torch.zeros_like(state) for state in encoded.states]
        for at in range(4):
            newest = (column[:, at : at + 1] for column in to_history(whole)[:4])
            event = History(*newest, lengths=torch.full((3,), at))
            grown = retriever.append(states, event)
            for state, new in zip(states, grown.states, strict=True):
                state[:, at] = new[:, 0]
            known = retriever.user_vectors(to_history(whole)._replace(lengths=torch.full((3,), at + 1)))
            torch.testing.assert_close(grown.user_vector, known, atol=1e-5, rtol=1e-5)
        for state, known in zip(states, encoded.states, strict=True):
            torch.testing.assert_close(state[:, :4], known[:, :4], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grown.user_vector[1], encoded.user_vector[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", SHAPES)
def test_the_graphs_append_as_the_network_does(changes, tmp_path):
    retriever = Retriever([network(**changes)])
    assert set(export(retriever, tmp_path)) == {"encode", "score", "rank", "append"}
    assert check_parity(retriever, tmp_path) < 1e-5


def test_an_append_graph_that_counts_distances_wrongly_is_found(tmp_path):
    right = network()
    wrong = copy.deepcopy(right)
    with torch.no_grad():
        wrong.layers[1].reach.copy_(right.layers[1].reach.roll(1))
    export(Retriever([wrong]), tmp_path)
    append = (tmp_path / "append.onnx").read_bytes()
    export(Retriever([right]), tmp_path)
    check_parity(Retriever([right]), tmp_path)
    (tmp_path / "append.onnx").write_bytes(append)
    with pytest.raises(ParityError, match="differ"):
        check_parity(Retriever([right]), tmp_path)


def signature(path):
    graph = onnx.load(path).graph
    return [
        {
            one.name: [size.dim_param or size.dim_value for size in one.type.tensor_type.shape.dim]
            for one in side
        }
        for side in (graph.input, graph.output)
    ]


def without_states(sides):
    return [{name: sizes for name, sizes in side.items() if name[-1] not in "0123456789"} for side in sides]


@pytest.mark.parametrize("graph", ["encode", "append", "rank"])
def test_the_graphs_have_the_inputs_and_outputs_of_the_ranking_networks(graph, tmp_path):
    (tmp_path / "ranking").mkdir()
    ranking.export(model(max_history=40), tmp_path / "ranking")
    export(Retriever([network()]), tmp_path)
    ours, theirs = (signature(folder / f"{graph}.onnx") for folder in (tmp_path, tmp_path / "ranking"))
    assert without_states(ours) == without_states(theirs)


def test_half_as_much_is_kept_of_an_event_as_by_a_network_whose_candidates_ask(tmp_path):
    (tmp_path / "ranking").mkdir()
    ranking.export(model(max_history=40), tmp_path / "ranking")
    export(Retriever([network()]), tmp_path)
    kept = []
    for folder in (tmp_path, tmp_path / "ranking"):
        given, _ = signature(folder / "append.onnx")
        kept.append([sizes for name, sizes in given.items() if name[-1] in "0123456789"])
    assert kept == [2 * [["users", "slots", 16]], 4 * [["users", "slots", 16]]]


def words(rows=12):
    return Vocabulary(
        item_ids=np.arange(1, ITEMS + 1),
        item_categories=np.ones(ITEMS, np.int32),
        category_ids=np.arange(1, rows - 2),
        item_buckets=ROWS - ITEMS - 1,
        category_buckets=2,
    )


def test_the_manifest_says_so_and_comes_back():
    config = RetrievalConfig(
        network=network(heads=2, layers=3).config, counts=None, fusion_weight=0.0, fitted="train"
    )
    shape = shape_of(config, words())
    assert (shape.states, shape.vector_scores, shape.scores_by_vector) == (True, True, True)
    assert (shape.layers, shape.heads, shape.dim, shape.max_history) == (3, 2, 16, 40)
    assert ModelShape.model_validate_json(shape.model_dump_json()) == shape


@pytest.mark.parametrize("members", [({"positions": True},), ({}, {"dim": 8})])
def test_positions_and_several_networks_have_no_states_to_append_to(members, tmp_path):
    retriever = Retriever([network(**changes) for changes in members])
    assert set(export(retriever, tmp_path)) == {"encode", "score", "rank"}
    assert list(signature(tmp_path / "encode.onnx")[1]) == ["user_vector"]
    first, *more = [one.config for one in retriever.members]
    config = RetrievalConfig(network=first, more=more, counts=None, fusion_weight=0.0, fitted="train")
    shape = shape_of(config, words())
    assert not shape.states and not shape.vector_scores and shape.scores_by_vector


def test_a_manifest_from_before_is_read_as_it_was_meant():
    before = {"item_rows": 9, "category_rows": 9}
    assert not ModelShape(**before).scores_by_vector
    assert ModelShape(**before, states=False).scores_by_vector


def test_with_categories_an_item_scores_by_its_own_row_and_its_categorys():
    made = network(category_rows=12)
    vectors = torch.randn(2, 16)
    candidates = torch.tensor([[1, 7, ROWS - 1], [30, 2, 0]])
    with torch.inference_mode():
        scores = Retriever([made]).score(vectors, candidates)
        rows = made.items.weight[candidates] + made.categories.weight[made.item_categories[candidates]]
        torch.testing.assert_close(scores, (rows * vectors[:, None]).sum(-1))
        torch.testing.assert_close(made.table()[candidates], rows)
        known = made.item_categories[1 : ITEMS + 1]
        torch.testing.assert_close(made.categories.weight[11], made.categories.weight[known].mean(0))


def test_what_was_recent_is_brought_along_from_the_start():
    torch.manual_seed(2)
    made = RetrievalNetwork(NetworkConfig(dim=16, layers=1, item_rows=ROWS, positions=False, dropout=0.0))
    made.start_with_recent(2.0)
    made.layers[0].attention.keep_map = True
    with torch.inference_mode():
        _, (seen,) = made.states(to_history(histories([6], 6, item_rows=ROWS)))
    expected = torch.arange(6, 0, -1.0) ** -2
    torch.testing.assert_close(seen[0, 0, 5], expected / expected.sum(), atol=0.03, rtol=0.1)
