"""Tables as codes: small, trained like a table, near to one that is there."""

import numpy as np
import pytest
import torch

from compression.smaller.product_codes import ProductTable, from_table


def test_a_row_is_the_pieces_its_codes_name():
    table = ProductTable(np.array([[0, 0], [1, 2], [2, 1]], np.uint8), width=3, pieces=3)
    row = table(torch.tensor([[1]]))[0, 0]
    assert torch.equal(row, torch.cat([table.pieces[0, 1], table.pieces[1, 2]]))
    assert table(torch.tensor([0])).abs().sum() == 0
    assert table.weight.shape == (3, 6)


def test_codes_from_a_table_are_near_to_it_and_nearer_with_more_splits():
    torch.manual_seed(0)
    table = torch.randn(2000, 16)
    errors = [
        float(((from_table(table, s).weight - table)[1:].detach()).norm() / table.norm()) for s in (4, 16)
    ]
    assert errors[1] < 0.2 < errors[0] < 0.9
    with pytest.raises(ValueError, match="splits"):
        from_table(table, 3)


def test_pieces_learn_and_codes_stay():
    table = ProductTable(np.random.default_rng(0).integers(0, 8, (40, 4)).astype(np.uint8), 2, 8)
    before, codes = table.weight.detach().clone(), table.codes.clone()
    optimizer = torch.optim.SGD(table.parameters(), 0.1)
    table(torch.tensor([3, 4])).sum().backward()
    optimizer.step()
    assert not torch.equal(table.weight[3], before[3])
    assert torch.equal(table.codes, codes)


def test_a_code_that_no_piece_has_is_refused():
    with pytest.raises(ValueError, match="fit"):
        ProductTable(np.full((3, 2), 9, np.uint8), 2, pieces=8)
