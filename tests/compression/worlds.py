"""Small worlds: a log written from a few numbers, and models of a size that trains in seconds."""

import numpy as np
import torch

from compression.evaluation.scoring import to_history
from compression.releases.registry import ModelShape
from compression.training.model import Recommender
from features.encoding import HistoryArrays


def model(seed=0, **changes):
    """A network with random weights everywhere, so that nothing is zero by its start."""
    fields = {"dim": 16, "layers": 2, "heads": 1, "ffn": 32, "max_history": 100}
    torch.manual_seed(seed)
    network = Recommender(ModelShape(**(fields | {"item_rows": 60, "category_rows": 12} | changes)))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network.eval()


def histories(lengths, slots, seed=0, *, item_rows=60, category_rows=12):
    """Random right-padded histories. The rows of a user depend on the seed and the user alone, not on
    the slots, so the same user can be looked at in a larger array."""
    columns = np.zeros((4, len(lengths), slots), np.int32)
    for user, length in enumerate(lengths):
        rng = np.random.default_rng([seed, user])
        for column, high in zip(columns, (item_rows, category_rows, 5, 32), strict=True):
            column[user, :length] = rng.integers(1, high, 200)[:length]
    return HistoryArrays(*columns, lengths=np.array(lengths, np.int32))


def scores(network, arrays, candidates, categories):
    with torch.inference_mode():
        encoded = network.encode(to_history(arrays))
        answer = network.score(
            encoded,
            torch.from_numpy(arrays.lengths),
            torch.from_numpy(np.asarray(candidates, np.int32)),
            torch.from_numpy(np.asarray(categories, np.int32)),
        )
    return encoded, answer
