"""A trained retrieval model as a version in the registry, and back.

What serves are its graphs and its item table (`compression.retrieval.export`), with the weights of the online
counts in the manifest. Beside these and the vocabulary a version holds `network.json`, how to build its
networks again and what to fuse them with over the full catalogue, and the weights of each. Those counts are
taken anew from the log that the model is used on.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compression.errors import ArtefactInvalid, first_fault
from compression.evaluation.transitions import COUNTS, TransitionSettings
from compression.releases.provenance import git_revision, libraries
from compression.releases.registry import (
    ITEM_TABLE,
    VOCABULARY,
    Artefact,
    Manifest,
    ModelShape,
    Registry,
    write_item_table,
)
from compression.retrieval.ensemble import TrainedEnsemble
from compression.retrieval.export import export
from compression.retrieval.network import NetworkConfig, RetrievalNetwork
from compression.retrieval.parity import check_parity
from compression.retrieval.recipe import RetrievalRecipe
from compression.retrieval.retriever import Retriever
from features.encoding import Vocabulary
from features.fusion import Fusion

NETWORK: Final = "network.json"
WEIGHTS: Final = "weights.safetensors"
_LIBRARIES: Final = ("torch", "onnx", "onnxruntime", "numpy", "scipy", "safetensors")

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
    fusion: Fusion,
    metrics: dict[str, Any],
    data: dict[str, Any],
) -> Manifest:
    """Publish without promoting. `fusion`: what online counts weigh where it serves. `data` says what it was
    fitted on and holds the log's `sha256` and the `seed`. Lists in the manifest's data are one entry a
    network. Raises `ParityError` where a graph does not answer as the networks do."""
    created = datetime.now(UTC)
    marked = f"{created.isoformat()}{data['sha256']}{data['seed']}{config.fitted}"
    retriever = Retriever(trained.networks)
    with tempfile.TemporaryDirectory(prefix="tailrace-") as folder:
        staging = Path(folder)
        graphs = stage(retriever, config, vocabulary, staging)
        manifest = Manifest.model_validate(
            {
                "schema": 1,
                "version": f"{created:%Y%m%dT%H%M%S}-{hashlib.sha256(marked.encode()).hexdigest()[:4]}",
                "created_at": created.isoformat(timespec="seconds"),
                "kind": "retrieval",
                "model": shape_of(config, vocabulary),
                "graphs": graphs,
                "fusion": fusion,
                "metrics": metrics | {"parity": check_parity(retriever, staging)},
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
        return registry.publish(staging, manifest)


def stage(
    retriever: Retriever, config: RetrievalConfig, vocabulary: Vocabulary, folder: Path
) -> dict[str, str]:
    """Write every file of a version but the manifest; the names of the graphs."""
    from safetensors.torch import save_file

    (folder / NETWORK).write_text(config.model_dump_json(indent=1))
    for number, network in enumerate(retriever.members):
        weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        save_file(weights, folder / weights_name(number))
    vocabulary.save(folder / VOCABULARY)
    write_item_table(folder / ITEM_TABLE, retriever.item_table().numpy())
    return export(retriever, folder)


def shape_of(config: RetrievalConfig, vocabulary: Vocabulary) -> ModelShape:
    """What serves: vectors as wide as all networks together; else the largest of any. One network without
    positions has states, as its graphs do."""
    members = (config.network, *config.more)
    states = len(members) == 1 and config.network.appends
    return ModelShape(
        dim=sum(sizes.dim for sizes in members),
        layers=max(sizes.layers for sizes in members),
        heads=max(sizes.heads for sizes in members),
        ffn=max(sizes.ffn for sizes in members),
        max_history=min(sizes.max_history for sizes in members),
        item_rows=vocabulary.item_rows,
        category_rows=vocabulary.category_rows,
        states=states,
        vector_scores=states,
    )


def load_config(artefact: Artefact) -> RetrievalConfig:
    try:
        config = RetrievalConfig.model_validate_json(artefact.read(NETWORK))
    except ValidationError as error:
        raise ArtefactInvalid(f"{artefact.version}: {NETWORK}: {first_fault(error)}") from None
    members, shape = (config.network, *config.more), artefact.manifest.model
    if {one.item_rows for one in members} != {shape.item_rows}:
        raise ArtefactInvalid(f"{artefact.version}: {NETWORK} and the manifest differ in rows")
    # Versions without graphs are described by the first network alone.
    if artefact.manifest.graphs and sum(one.dim for one in members) != shape.dim:
        raise ArtefactInvalid(f"{artefact.version}: {NETWORK} and the manifest differ in the user vector")
    return config


def load_networks(artefact: Artefact) -> list[RetrievalNetwork]:
    """The networks of a version, in evaluation mode, or `ArtefactInvalid`."""
    if artefact.manifest.kind != "retrieval":
        raise ArtefactInvalid(f"{artefact.version} is no retrieval model")
    return build(load_config(artefact), artefact.read, artefact.version)


def build(config: RetrievalConfig, read: Callable[[str], bytes], named: str) -> list[RetrievalNetwork]:
    """The networks of a configuration, their files read by name; `ArtefactInvalid` where one is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    networks = []
    for number, sizes in enumerate((config.network, *config.more)):
        network, name = RetrievalNetwork(sizes), weights_name(number)
        try:
            network.load_state_dict(load(read(name)))
        except (RuntimeError, SafetensorError) as error:
            raise ArtefactInvalid(f"{named}: {name}: {error}") from None
        networks.append(network.eval())
    return networks


def weights_name(number: int) -> str:
    """The file of the first network, and of those beside it."""
    return WEIGHTS if number == 0 else f"weights-{number + 1}.safetensors"
