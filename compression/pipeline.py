"""Retraining as ordered steps: read, encode, train, evaluate, export, verify, publish, promote.

Each step is a function that can be called alone; `retrain` is the list of them and tells a listener
how far it is.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from compression.dataset import MAX_EVENTS, Log, Split, SplitName, build_vocabulary, read_log
from compression.dataset import split as split_sequences
from compression.evaluate import evaluate
from compression.export import check_parity, export
from compression.model import Recommender
from compression.registry import ITEM_TABLE, SERVING, VOCABULARY, Manifest, Registry
from compression.scoring import ArtefactScorer, TorchScorer, row_categories
from compression.train import Recipe, Trained, train
from features.encoding import Vocabulary

STEPS = ("read", "train", "evaluate", "export", "verify", "publish", "promote")
WEIGHTS = "weights.safetensors"
JUDGED = 2_000  # test targets; `tailrace evaluate --limit` judges by more
_LIBRARIES = ("torch", "onnx", "onnxruntime", "numpy", "safetensors")

Progress = Callable[[str, float, str], None]  # step, fraction of the step, what it is doing


@dataclass(frozen=True, slots=True)
class RetrainSettings:
    """What to retrain from and where the result goes. `alias` None publishes without promoting."""

    log: Path
    registry: Path
    recipe: Recipe
    split: SplitName = "leave-one-out"
    seed: int = 1
    max_events: int = MAX_EVENTS
    alias: str | None = SERVING


@dataclass(frozen=True, slots=True, eq=False)
class Retrained:
    """A published version and how it came about."""

    manifest: Manifest
    manifest_sha256: str
    path: Path
    alias: str | None
    seconds: dict[str, float]


def retrain(settings: RetrainSettings, progress: Progress = lambda step, fraction, note: None) -> Retrained:
    """Run every step. Nothing is published unless all before it went well."""
    clock = _Clock(progress)
    registry = Registry(settings.registry)
    registry.check_publishing()
    with clock.step("read") as tell:
        log = read_log(settings.log, max_events=settings.max_events, progress=tell.fraction)
        vocabulary = encode_vocabulary(log, settings.recipe)
        split = split_sequences(log.sequences, settings.split)
    with clock.step("train") as tell:
        trained = train(log.sequences, split, vocabulary, settings.recipe, seed=settings.seed, progress=tell)
    with clock.step("evaluate"):
        metrics = judge(trained.model, log, split, vocabulary)
    with tempfile.TemporaryDirectory(prefix="tailrace-") as folder:
        staging = Path(folder)
        with clock.step("export"):
            graphs = stage(trained.model, vocabulary, staging)
        with clock.step("verify"):
            metrics["parity"] = check_parity(trained.model, staging)
        with clock.step("publish"):
            manifest = describe(settings, log, trained, metrics=metrics, graphs=graphs)
            manifest = registry.publish(staging, manifest)
            artefact = registry.open(manifest.version)
            ArtefactScorer(artefact)
    if settings.alias is not None:
        with clock.step("promote"):
            registry.promote(manifest.version, settings.alias)
    return Retrained(manifest, artefact.manifest_sha256, artefact.path, settings.alias, clock.seconds)


def encode_vocabulary(log: Log, recipe: Recipe) -> Vocabulary:
    return build_vocabulary(
        log.sequences,
        max_items=recipe.max_items,
        item_buckets=recipe.item_buckets,
        category_buckets=recipe.category_buckets,
    )


def judge(model: Recommender, log: Log, split: Split, vocabulary: Vocabulary) -> dict[str, Any]:
    scorer = TorchScorer(model, row_categories(vocabulary))
    shape = model.shape
    length = shape.max_history
    return evaluate(scorer, log.sequences, split, vocabulary, max_history=length, limit=JUDGED, count=False)


def stage(model: Recommender, vocabulary: Vocabulary, folder: Path) -> dict[str, str]:
    """Write every file of a version but the manifest; the names of the graphs."""
    from safetensors.torch import save_file

    graphs = export(model, folder)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS)
    vocabulary.save(folder / VOCABULARY)
    table = TorchScorer(model, row_categories(vocabulary)).item_table()
    with (folder / ITEM_TABLE).open("wb") as file:
        np.save(file, np.ascontiguousarray(table, np.float32), allow_pickle=False)
    return graphs


def describe(
    settings: RetrainSettings, log: Log, trained: Trained, *, metrics: dict[str, Any], graphs: dict[str, str]
) -> Manifest:
    """The manifest of what is about to be published; the registry adds the checksums."""
    created = datetime.now(UTC)
    digest = sha256_of(settings.log)
    mark = hashlib.sha256(f"{created.isoformat()}{digest}{settings.seed}".encode()).hexdigest()[:4]
    try:
        parent = Registry(settings.registry).resolve(SERVING)
    except ValueError:
        parent = None
    return Manifest.model_validate(
        {
            "schema": 1,
            "version": f"{created:%Y%m%dT%H%M%S}-{mark}",
            "created_at": created.isoformat(timespec="seconds"),
            "parent": parent,
            "model": trained.model.shape,
            "graphs": graphs,
            "metrics": metrics,
            "data": {
                "log": settings.log.name,
                "sha256": digest,
                "events": len(log.sequences),
                "users": len(log.sequences.users),
                "bad_rows": log.report.bad_rows,
                "left_out": log.left_out,
                "truncated": log.report.truncated,
                "first_timestamp": int(log.sequences.timestamps.min()),
                "last_timestamp": int(log.sequences.timestamps.max()),
                "split": settings.split,
                "seed": settings.seed,
                "epochs": len(trained.epochs),
                "best_epoch": trained.best,
                "stopped": trained.stopped,
            },
            "git_revision": git_revision(),
            "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        }
    )


class _Clock:
    """Times the steps and tells the listener."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    def step(self, name: str) -> _Step:
        return _Step(self, name)


class _Step:
    def __init__(self, clock: _Clock, name: str) -> None:
        self._clock, self._name = clock, name
        self._started = time.monotonic()

    def __enter__(self) -> _Step:
        self(0.0, "")
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self._clock.seconds[self._name] = round(time.monotonic() - self._started, 2)
        if kind is None:
            self(1.0, "")

    def __call__(self, fraction: float, note: str) -> None:
        self._clock.progress(self._name, fraction, note)

    def fraction(self, fraction: float) -> None:
        self(fraction, "")


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_revision() -> str | None:
    """Of the code that runs, where it is a checkout."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
