"""What all tests of this folder have in common."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small only wait for a second thread, and long where other processes want to run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
