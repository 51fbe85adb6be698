"""The files of a version, made from a network."""

from __future__ import annotations

from pathlib import Path

import torch

from compression.evaluation.scoring import TorchScorer, row_categories
from compression.releases.registry import ITEM_TABLE, VOCABULARY, write_item_table
from compression.training.export import export
from compression.training.model import Recommender
from compression.training.warm_start import WEIGHTS
from compression.training.weights import codes, write
from features.encoding import Vocabulary


def stage(
    model: Recommender, vocabulary: Vocabulary, folder: Path, *, rounded: bool = False
) -> dict[str, str]:
    """Write every file of a version but the manifest; the names of the graphs. `rounded`: the model's
    tables are on their grid, and are written, as the item table is, in 8 bits."""
    graphs = export(model, folder, rounded=rounded)
    write(folder / WEIGHTS, model.state_dict(), rounded=rounded)
    vocabulary.save(folder / VOCABULARY)
    table = TorchScorer(model, row_categories(vocabulary)).item_table()
    if rounded:
        counted, step = codes(torch.from_numpy(table))
        write_item_table(folder / ITEM_TABLE, counted.numpy(), step.numpy()[:, 0])
    else:
        write_item_table(folder / ITEM_TABLE, table)
    return graphs
