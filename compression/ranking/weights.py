"""A ranker's weights: drawn, copied, loaded, counted, and a student's first table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch

from compression.attention.full import FullAttention
from compression.ranking.network import CandidateRanker
from compression.retrieval.network import NetworkConfig, RetrievalNetwork
from compression.smaller import packed, structured

TABLE: Final = "network.items"
"""The name of the item table in a ranker."""


def untrained(config: NetworkConfig, seed: int) -> CandidateRanker:
    """Random weights: enough for all that does not depend on what was learned."""
    torch.manual_seed(seed)
    ranker = CandidateRanker(RetrievalNetwork(config))
    assert all(isinstance(layer.attention, FullAttention) for layer in ranker.layers)
    return ranker.eval()


def copy(ranker: CandidateRanker) -> CandidateRanker:
    weights: Mapping[str, torch.Tensor] = ranker.state_dict()
    made = CandidateRanker(RetrievalNetwork(ranker.network.config))
    own = {name.removeprefix("network."): one for name, one in weights.items() if name.startswith("network.")}
    structured.fit_to(made.network, own)
    made.load_state_dict(weights)
    return made


def load(path: Path, config: NetworkConfig) -> CandidateRanker:
    """A stored ranker; its layers may be smaller than the configuration says."""
    weights = packed.read(path)
    ranker = CandidateRanker(RetrievalNetwork(config))
    own = {name.removeprefix("network."): one for name, one in weights.items() if name.startswith("network.")}
    structured.fit_to(ranker.network, own)
    ranker.load_state_dict(weights)
    return ranker.eval()


def count(ranker: CandidateRanker) -> int:
    return sum(parameter.numel() for parameter in ranker.parameters())


@torch.no_grad()
def narrow_table(student: CandidateRanker, teacher: CandidateRanker) -> None:
    """Let the student's table begin as the teacher's in its directions of most variance."""
    table = teacher.network.items.weight
    _, _, directions = torch.linalg.svd(table.T @ table)
    student.network.items.weight.copy_(table @ directions[: student.network.config.dim].T)
