"""Run by `infra.export.litert` in the converter's own venv: FOLDER in, FOLDER out.

model.json, weights.safetensors, inputs.npz   the network, and what to ask it
rank.tflite, scores.npy                       the model, and the LiteRT interpreter's answers
"""

from __future__ import annotations

import sys
from pathlib import Path

import litert_torch
import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from torch import Tensor, nn

from compression.releases.registry import ModelShape
from compression.training.model import History, Recommender
from compression.training.weights import read


class Rank(nn.Module):
    """Encode and score in one."""

    def __init__(self, network: Recommender) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        items: Tensor,
        categories: Tensor,
        behaviors: Tensor,
        gaps: Tensor,
        lengths: Tensor,
        candidates: Tensor,
        candidate_categories: Tensor,
    ) -> dict[str, Tensor]:
        encoded = self.network.encode(History(items, categories, behaviors, gaps, lengths))
        return {"scores": self.network.score(encoded, lengths, candidates, candidate_categories)}


def convert(folder: Path) -> None:
    network = Recommender(ModelShape.model_validate_json((folder / "model.json").read_bytes()))
    network.load_state_dict(read((folder / "weights.safetensors").read_bytes()))
    with np.load(folder / "inputs.npz", allow_pickle=False) as arrays:
        asked = dict(arrays)
    first = {name: torch.from_numpy(array[:1]) for name, array in asked.items()}
    litert_torch.convert(Rank(network).eval(), sample_kwargs=first).export(str(folder / "rank.tflite"))
    run = Interpreter(str(folder / "rank.tflite"), num_threads=1).get_signature_runner()
    users = range(len(asked["lengths"]))
    scores = [run(**{name: array[user : user + 1] for name, array in asked.items()}) for user in users]
    np.save(folder / "scores.npy", np.concatenate([answer["scores"] for answer in scores]))


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
