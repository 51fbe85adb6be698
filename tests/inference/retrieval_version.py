"""Released versions of retrieval networks with random weights, over the vocabulary of these tests: of two,
and of one that events are appended to."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from compression.releases.registry import Manifest, Registry
from compression.retrieval.network import NetworkConfig, RetrievalNetwork
from compression.retrieval.release import RetrievalConfig, shape_of, stage
from compression.retrieval.retriever import Retriever, stand_in
from features.fusion import Fusion
from tests.inference.conftest import ITEMS, MAX_HISTORY, vocabulary

NAME = "20260303T000000-both"
BOTH: tuple[dict[str, Any], ...] = (
    {"dim": 16, "heads": 2},
    {"dim": 8, "layers": 1, "activation": "relu", "gaps": True},
)
ONE: tuple[dict[str, Any], ...] = (
    {"dim": 16, "heads": 2, "positions": False, "gaps": True, "behaviors": True},
)


def retriever(sizes: tuple[dict[str, Any], ...] = BOTH, seed: int = 3) -> Retriever:
    """Networks whose scores are as far apart as those of trained ones."""
    torch.manual_seed(seed)
    rows = vocabulary().item_rows
    networks = [
        RetrievalNetwork(NetworkConfig(**one, ffn=24, max_history=MAX_HISTORY, item_rows=rows))
        for one in sizes
    ]
    with torch.no_grad():
        for network in networks:
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            network.items.weight[0] = 0
    stand_in(networks, len(ITEMS))
    return Retriever(networks).eval()


def publish(
    root: Path,
    name: str = NAME,
    sizes: tuple[dict[str, Any], ...] = BOTH,
    *,
    fusion: Fusion | None = None,
) -> Retriever:
    """Publish it without promoting."""
    made, words = retriever(sizes), vocabulary()
    first, *more = (network.config for network in made.members)
    config = RetrievalConfig(network=first, more=tuple(more), counts=None, fusion_weight=0.0, fitted="train")
    with tempfile.TemporaryDirectory() as folder:
        graphs = stage(made, config, words, Path(folder))
        manifest = Manifest(
            version=name,
            created_at="2026-03-03T00:00:00Z",
            kind="retrieval",
            model=shape_of(config, words),
            graphs=graphs,
            fusion=fusion,
        )
        Registry(root).publish(Path(folder), manifest)
    return made
