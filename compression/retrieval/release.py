"""A trained retrieval model as a version in the registry, and back.

Beside the vocabulary a version holds `network.json`, how to build the network again and what to fuse it
with, and the weights. Counts are taken anew from the log that the model is used on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compression.errors import ArtefactInvalid
from compression.evaluation.transitions import COUNTS, TransitionSettings
from compression.releases.provenance import git_revision
from compression.releases.registry import VOCABULARY, Artefact, Manifest, ModelShape, Registry
from compression.retrieval.network import NetworkConfig, RetrievalNetwork
from compression.retrieval.recipe import RetrievalRecipe
from compression.retrieval.trainer import TrainedRetrieval
from features.encoding import Vocabulary

NETWORK: Final = "network.json"
WEIGHTS: Final = "weights.safetensors"
_LIBRARIES: Final = ("torch", "numpy", "scipy", "safetensors")

Fitted = Literal["train", "train+validation"]


class RetrievalConfig(BaseModel):
    """`network.json`. `fitted`: on what part of each user's events; `counts` None: nothing to fuse with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: NetworkConfig
    counts: TransitionSettings | None
    fusion_weight: float = Field(ge=0)
    fitted: Fitted


def config_of(trained: TrainedRetrieval, recipe: RetrievalRecipe, fitted: Fitted) -> RetrievalConfig:
    return RetrievalConfig(
        network=trained.network.config,
        counts=COUNTS[recipe.counts] if recipe.counts else None,
        fusion_weight=trained.selection.verdict.weight,
        fitted=fitted,
    )


def publish(
    registry: Registry,
    trained: TrainedRetrieval,
    config: RetrievalConfig,
    vocabulary: Vocabulary,
    *,
    recipe: RetrievalRecipe,
    metrics: dict[str, Any],
    data: dict[str, Any],
) -> Manifest:
    """Publish without promoting: nothing serves such a version. `data` says what it was fitted on and
    holds the log's `sha256` and the `seed`."""
    from safetensors.torch import save_file

    created = datetime.now(UTC)
    marked = f"{created.isoformat()}{data['sha256']}{data['seed']}{config.fitted}"
    sizes = config.network
    manifest = Manifest.model_validate(
        {
            "schema": 1,
            "version": f"{created:%Y%m%dT%H%M%S}-{hashlib.sha256(marked.encode()).hexdigest()[:4]}",
            "created_at": created.isoformat(timespec="seconds"),
            "kind": "retrieval",
            "model": ModelShape(
                dim=sizes.dim,
                layers=sizes.layers,
                heads=sizes.heads,
                ffn=sizes.ffn,
                max_history=sizes.max_history,
                item_rows=sizes.item_rows,
                category_rows=vocabulary.category_rows,
            ),
            "metrics": metrics,
            "data": data
            | {
                "fitted": config.fitted,
                "recipe": recipe.model_dump(mode="json"),
                "epochs": len(trained.epochs),
                "selected_epochs": trained.selection.epochs,
                "validation": asdict(trained.selection.verdict),
                "stopped": trained.stopped,
                "core_minutes": round(trained.core_seconds / 60, 2),
                "minutes": round(trained.seconds / 60, 2),
            },
            "git_revision": git_revision(),
            "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        }
    )
    with tempfile.TemporaryDirectory(prefix="tailrace-") as folder:
        staging = Path(folder)
        (staging / NETWORK).write_text(config.model_dump_json(indent=1))
        weights = {name: tensor.contiguous() for name, tensor in trained.network.state_dict().items()}
        save_file(weights, staging / WEIGHTS)
        vocabulary.save(staging / VOCABULARY)
        return registry.publish(staging, manifest)


def load_config(artefact: Artefact) -> RetrievalConfig:
    try:
        config = RetrievalConfig.model_validate_json(artefact.read(NETWORK))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ArtefactInvalid(f"{artefact.version}: {NETWORK}: {field}: {first['msg']}") from None
    if config.network.item_rows != artefact.manifest.model.item_rows:
        raise ArtefactInvalid(f"{artefact.version}: {NETWORK} and the manifest differ in rows")
    return config


def load_network(artefact: Artefact) -> RetrievalNetwork:
    """The network of a version, in evaluation mode, or `ArtefactInvalid`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    network = RetrievalNetwork(load_config(artefact).network)
    try:
        network.load_state_dict(load(artefact.read(WEIGHTS)))
    except (RuntimeError, SafetensorError) as error:
        raise ArtefactInvalid(f"{artefact.version}: {WEIGHTS}: {error}") from None
    return network.eval()
