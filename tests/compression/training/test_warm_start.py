"""Starting from the version that serves: every row goes where its id has gone."""

import numpy as np
import pytest
import torch
from safetensors.torch import save

from compression.errors import ArtefactInvalid
from compression.releases.registry import ModelShape
from compression.training.warm_start import check_shape, grown, starting_weights
from features.encoding import Vocabulary


def vocabulary(items, categories, of_item):
    rows = np.searchsorted(categories, of_item) + 1
    return Vocabulary(np.array(items), rows.astype(np.int32), np.array(categories), 8, 4)


BEFORE = vocabulary([10, 20, 30], [1, 3], [1, 3, 3])
LATEST = vocabulary([15, 20, 40], [2, 3], [2, 2, 3])


class Serving:
    """As much of an artefact as its weights."""

    def __init__(self, weights):
        self._weights = weights

    def read(self, name):
        assert name == "weights.safetensors"
        return save(self._weights)


def test_what_either_knows_is_known_and_the_latest_category_counts():
    both = grown(BEFORE, LATEST, 100)
    assert both.item_ids.tolist() == [10, 15, 20, 30, 40]
    assert both.category_ids[both.item_categories - 1].tolist() == [1, 2, 2, 3, 3]


def test_where_that_is_too_much_items_that_only_the_old_one_knows_give_way():
    assert grown(BEFORE, LATEST, 4).item_ids.tolist() == [10, 15, 20, 40]
    assert grown(BEFORE, LATEST, 3).item_ids.tolist() == [15, 20, 40]


def test_rows_go_with_their_ids_and_a_new_item_starts_as_its_bucket():
    generator = torch.Generator().manual_seed(1)
    items = torch.randn(BEFORE.item_rows, 4, generator=generator)
    categories = torch.randn(BEFORE.category_rows, 4, generator=generator)
    other = torch.randn(3, generator=generator)
    serving = Serving({"items.weight": items, "categories.weight": categories, "other": other})
    both = grown(BEFORE, LATEST, 100)
    weights = starting_weights(serving, BEFORE, both)
    assert weights["items.weight"].shape == (both.item_rows, 4)
    assert weights["categories.weight"].shape == (both.category_rows, 4)
    assert torch.equal(weights["other"], other)
    for ids in ([10, 20, 30], [15, 40]):
        now, then = both.item_rows_of(np.array(ids)), BEFORE.item_rows_of(np.array(ids))
        assert torch.equal(weights["items.weight"][now.tolist()], items[then.tolist()])
    unknown = np.array([999, 12345])
    now, then = both.item_rows_of(unknown), BEFORE.item_rows_of(unknown)
    assert torch.equal(weights["items.weight"][now.tolist()], items[then.tolist()])
    now, then = both.category_rows_of(np.array([1, 3, 77])), BEFORE.category_rows_of(np.array([1, 3, 77]))
    assert torch.equal(weights["categories.weight"][now.tolist()], categories[then.tolist()])
    assert torch.equal(weights["items.weight"][0], items[0])


def test_weights_of_another_network_are_refused_in_a_sentence():
    shape = ModelShape(item_rows=10, category_rows=5)
    check_shape(shape, ModelShape(item_rows=20, category_rows=9))
    with pytest.raises(ArtefactInvalid, match="dim 64, not 32"):
        check_shape(shape, ModelShape(dim=32, item_rows=10, category_rows=5))
