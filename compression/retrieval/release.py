"""A trained retrieval model as a version in the registry, and back.

Beside the vocabulary a version holds `network.json`, how to build its networks again and what to fuse
them with, and the weights of each. Counts are taken anew from the log that the model is used on.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compression.errors import ArtefactInvalid, first_fault
from compression.evaluation.transitions import COUNTS, TransitionSettings
from compression.releases.provenance import git_revision, libraries
from compression.releases.registry import VOCABULARY, Artefact, Manifest, ModelShape, Registry
from compression.retrieval.ensemble import TrainedEnsemble
from compression.retrieval.network import NetworkConfig, RetrievalNetwork
from compression.retrieval.recipe import RetrievalRecipe
from features.encoding import Vocabulary

NETWORK: Final = "network.json"
WEIGHTS: Final = "weights.safetensors"
_LIBRARIES: Final = ("torch", "numpy", "scipy", "safetensors")

Fitted = Literal["train", "train+validation"]


class RetrievalConfig(BaseModel):
    """`network.json`. `fitted`: on what part of each user's events; `counts` None: nothing to fuse with;
    `more`: networks beside the first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: NetworkConfig
    more: tuple[NetworkConfig, ...] = Field(default=(), max_length=15)
    counts: TransitionSettings | None
    fusion_weight: float = Field(ge=0)
    fitted: Fitted


def config_of(trained: TrainedEnsemble, recipe: RetrievalRecipe, fitted: Fitted) -> RetrievalConfig:
    first, *more = [network.config for network in trained.networks]
    counts = recipe.fused().counts
    return RetrievalConfig(
        network=first,
        more=tuple(more),
        counts=COUNTS[counts] if counts else None,
        fusion_weight=trained.verdict.weight,
        fitted=fitted,
    )


def publish(
    registry: Registry,
    trained: TrainedEnsemble,
    config: RetrievalConfig,
    vocabulary: Vocabulary,
    *,
    recipe: RetrievalRecipe,
    metrics: dict[str, Any],
    data: dict[str, Any],
) -> Manifest:
    """Publish without promoting: nothing serves such a version. `data` says what it was fitted on and
    holds the log's `sha256` and the `seed`. Lists in the manifest's data are one entry a network."""
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
                "epochs": [len(member.epochs) for member in trained.members],
                "selected_epochs": [member.selection.epochs for member in trained.members],
                "validation": asdict(trained.verdict),
                "stopped": [member.stopped for member in trained.members],
                "core_minutes": round(trained.core_seconds / 60, 2),
                "minutes": round(trained.seconds / 60, 2),
            },
            "git_revision": git_revision(),
            "libraries": libraries(_LIBRARIES),
        }
    )
    with tempfile.TemporaryDirectory(prefix="tailrace-") as folder:
        staging = Path(folder)
        (staging / NETWORK).write_text(config.model_dump_json(indent=1))
        for number, network in enumerate(trained.networks):
            weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
            save_file(weights, staging / weights_name(number))
        vocabulary.save(staging / VOCABULARY)
        return registry.publish(staging, manifest)


def load_config(artefact: Artefact) -> RetrievalConfig:
    try:
        config = RetrievalConfig.model_validate_json(artefact.read(NETWORK))
    except ValidationError as error:
        raise ArtefactInvalid(f"{artefact.version}: {NETWORK}: {first_fault(error)}") from None
    rows = {one.item_rows for one in (config.network, *config.more)}
    if rows != {artefact.manifest.model.item_rows}:
        raise ArtefactInvalid(f"{artefact.version}: {NETWORK} and the manifest differ in rows")
    return config


def load_networks(artefact: Artefact) -> list[RetrievalNetwork]:
    """The networks of a version, in evaluation mode, or `ArtefactInvalid`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    config = load_config(artefact)
    networks = []
    for number, sizes in enumerate((config.network, *config.more)):
        network, name = RetrievalNetwork(sizes), weights_name(number)
        try:
            network.load_state_dict(load(artefact.read(name)))
        except (RuntimeError, SafetensorError) as error:
            raise ArtefactInvalid(f"{artefact.version}: {name}: {error}") from None
        networks.append(network.eval())
    return networks


def weights_name(number: int) -> str:
    """The file of the first network, and of those beside it."""
    return WEIGHTS if number == 0 else f"weights-{number + 1}.safetensors"
