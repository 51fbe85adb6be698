"""Retraining as ordered steps: read, train, evaluate, export, gate, publish, promote, announce.

Where the recipe asks for a smaller network, the stages of its compression come after train, and what they end
with is evaluated, exported and judged: beside the version that serves, and beside what training had made.

What a step makes is kept in the run's folder (`compression.retraining.runs`), so that a run that was
killed goes on at its step, training within it. Nothing is published unless the gate lets it; nothing is
promoted by a process whose lease went to another.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from compression.evaluation import gate
from compression.evaluation.evaluate import evaluate
from compression.evaluation.fusion import fuse
from compression.evaluation.gate import GateLimits, GateRefused, Judged, Verdict
from compression.evaluation.scoring import ArtefactScorer, GraphScorer, TorchScorer, row_categories
from compression.logs.dataset import MAX_EVENTS, Log, Sequences, Split, SplitName, build_vocabulary
from compression.logs.dataset import split as split_sequences
from compression.logs.sources import LogFile, Source
from compression.releases.registry import (
    ITEM_TABLE,
    SERVING,
    VOCABULARY,
    Artefact,
    ArtefactInvalid,
    Manifest,
    ModelShape,
    Registry,
    read_item_table,
    write_item_table,
)
from compression.retraining.runs import Run
from compression.smaller import compress
from compression.smaller.plan import Compression
from compression.training.checkpoint import EVERY_S, Checkpoints, Stopped
from compression.training.checkpoint import FILE as CHECKPOINT
from compression.training.export import check_parity, export
from compression.training.model import Recommender
from compression.training.processes import Local, Team
from compression.training.train import Recipe, Trained, train
from compression.training.warm_start import (
    TEACHER,
    WEIGHTS,
    check_shape,
    grown,
    starting_weights,
    trained_as,
)
from compression.training.weights import codes, write
from features.encoding import Vocabulary

_BEFORE, _AFTER = ("read", "train"), ("evaluate", "export", "gate", "publish", "promote", "announce")
STEPS = (*_BEFORE, *_AFTER)
JUDGED = 2_000  # test targets; `tailrace evaluate --limit` judges by more
FUSED = 1_000  # targets of validation, and of the test, that the weights of online counts are judged by
_LIBRARIES = ("torch", "onnx", "onnxruntime", "numpy", "safetensors")
_SEQUENCES = "sequences.npz"
_STAGING = "staging"
_TEACHER_STAGING = "staging-teacher"

Progress = Callable[[str, float, str], None]  # step, fraction of the step, what it is doing


def steps_of(recipe: Recipe) -> tuple[str, ...]:
    """Every step of a run, in order."""
    return (*_BEFORE, *recipe.compression.stages, *_AFTER)


@dataclass(frozen=True, slots=True)
class RetrainSettings:
    """What to retrain from and where the result goes. `alias` None publishes without promoting.
    `from_serving` starts from the weights of the version that serves; `force` publishes what the gate
    refuses, with the note."""

    log: Path | Source
    registry: Path
    recipe: Recipe
    split: SplitName = "leave-one-out"
    seed: int = 1
    max_events: int = MAX_EVENTS
    alias: str | None = SERVING
    from_serving: bool = False
    force: str | None = None
    limits: GateLimits | None = None  # None: as the environment says
    checkpoint_s: float = EVERY_S


@dataclass(frozen=True, slots=True, eq=False)
class Retrained:
    """A published version and how it came about."""

    manifest: Manifest
    manifest_sha256: str
    path: Path
    alias: str | None
    seconds: dict[str, float]
    verdict: Verdict
    announced: bool


class Guard(Protocol):
    """Says whether this process may still change the registry; raises where it may not."""

    def check(self) -> None: ...
    def changing(self) -> AbstractContextManager[None]: ...


class _NoGuard:
    def check(self) -> None:
        pass

    def changing(self) -> AbstractContextManager[None]:
        return nullcontext()


Announce = Callable[[Manifest, str, Path], str | None]  # what went wrong, in a sentence


def retrain(
    settings: RetrainSettings,
    progress: Progress = lambda step, fraction, note: None,
    *,
    run: Run | None = None,
    guard: Guard | None = None,
    announce: Announce | None = None,
    stopping: Callable[[], bool] = lambda: False,
    team: Team | None = None,
) -> Retrained:
    """Run every step that `run` has not done yet; without a run nothing is kept. `GateRefused` and
    `Superseded` end it for good, `Stopped` until it is taken up again. The processes of a `team` train
    together; all else is done by this one."""
    with tempfile.TemporaryDirectory(prefix="tailrace-") as folder:
        kept = run or Run.begin(Path(folder), "once")
        with kept:
            work = _Work(settings, kept, progress, guard or _NoGuard(), stopping, team or Local())
            try:
                return work.all_steps(announce)
            except GateRefused as error:
                kept.end("refused", str(error))
                raise
            except Stopped:
                raise
            except Exception as error:
                kept.end("failed", f"{type(error).__name__}: {error}"[:2_000])
                raise


class _Work:
    """The steps of one run. What an earlier process did is read from the folder when it is asked for."""

    def __init__(
        self,
        settings: RetrainSettings,
        run: Run,
        progress: Progress,
        guard: Guard,
        stopping: Callable[[], bool],
        team: Team,
    ) -> None:
        self.settings, self.run, self.guard, self.stopping = settings, run, guard, stopping
        self.team = team
        self._progress = progress
        self.registry = Registry(settings.registry)
        self.staging = run.folder / _STAGING

    def all_steps(self, announce: Announce | None) -> Retrained:
        run, settings = self.run, self.settings
        self.registry.check_publishing()
        read = self.step("read", self.read)
        trained = self.step("train", self.train)
        for name in self.stages:
            trained = self.step(name, lambda tell, name=name: self.compress(name, tell))  # type: ignore[misc]
        metrics = self.step("evaluate", self.evaluate)
        exported = self.step("export", self.export)
        verdict = Verdict.model_validate(self.gate())
        manifest = self.describe(read, trained, metrics, exported, verdict)
        published = self.step("publish", lambda _: self.publish(manifest))
        manifest = self.registry.manifest(manifest.version)
        path, digest = settings.registry / "versions" / manifest.version, published["manifest_sha256"]
        if settings.alias is not None:
            alias = settings.alias
            self.step("promote", lambda _: self.promote(manifest.version, alias))
        told: dict[str, Any] = {}
        if settings.alias is not None and announce is not None:
            say = announce
            told = self.step("announce", lambda _: {"error": say(manifest, digest, path)})
        run.end("published", f"forced: {settings.force}" if verdict.forced else "")
        weights = (WEIGHTS, *(f"{name}.safetensors" for name in self.stages))
        run.clear(_SEQUENCES, VOCABULARY, *weights, CHECKPOINT, _STAGING, _TEACHER_STAGING)
        seconds = {name: step.seconds for name, step in run.state.steps.items()}
        announced = bool(told) and told["error"] is None
        return Retrained(manifest, digest, path, settings.alias, seconds, verdict, announced)

    def step(self, name: str, work: Callable[[_Step], dict[str, Any]]) -> dict[str, Any]:
        """What the step said, now or in an earlier process."""
        found = self.run.done(name)
        if found is not None:
            return found
        self.tell(name, 0.0, "")
        began_s = time.monotonic()
        result = work(_Step(self, name))
        self.run.finish(name, time.monotonic() - began_s, result)
        self.tell(name, 1.0, "")
        return self.run.state.steps[name].result

    def tell(self, name: str, fraction: float, note: str) -> None:
        """How far it is; the place where a run ends that is to end, or that has lost its lease."""
        self.guard.check()
        self.run.tell(name, fraction, note)
        self._progress(name, fraction, note)
        # Training keeps its state first, and says so itself.
        trains = name == "train" or name in self.stages
        if self.stopping() and (not trains or fraction in (0.0, 1.0)):
            raise Stopped(f"asked to end during {name}")

    # Steps -----------------------------------------------------------------------------------------

    def read(self, tell: _Step) -> dict[str, Any]:
        settings = self.settings
        source = LogFile(settings.log) if isinstance(settings.log, Path) else settings.log
        log = source.read(settings.max_events, tell.fraction)
        vocabulary = encode_vocabulary(log, settings.recipe)
        parent = self._serving_version()
        if settings.from_serving:
            before = self._base(parent)
            vocabulary = grown(before.vocabulary(), vocabulary, settings.recipe.max_items)
        vocabulary.save(self.run.folder / VOCABULARY)
        save_sequences(log.sequences, self.run.folder / _SEQUENCES)
        self.sequences, self.vocabulary = log.sequences, vocabulary
        stamps = log.sequences.timestamps
        return {
            "parent": parent,
            "started_from": parent if settings.from_serving else None,
            "data": source.provenance()
            | {
                "events": len(log.sequences),
                "users": len(log.sequences.users),
                "bad_rows": log.report.bad_rows,
                "bad_reasons": log.report.reasons,
                "left_out": log.left_out,
                "truncated": log.report.truncated,
                "first_timestamp": int(stamps.min()),
                "last_timestamp": int(stamps.max()),
            },
        }

    def train(self, tell: _Step) -> dict[str, Any]:
        from safetensors.torch import save_file

        settings, folder = self.settings, self.run.folder
        weights = None
        if started_from := self._read["started_from"]:
            base = self._base(started_from)
            file, _ = trained_as(base.manifest)
            weights = starting_weights(base, base.vocabulary(), self.vocabulary, file)
        recipe = replace(settings.recipe, compression=Compression())
        with self.team.joined() as group:
            trained = train(
                self.sequences,
                self.split,
                self.vocabulary,
                recipe,
                seed=settings.seed,
                progress=tell,
                weights=weights,
                checkpoints=self._checkpoints(
                    f"{asdict(recipe)} {settings.seed} {started_from} processes {group.size}"
                ),
                group=group,
            )
        self.teacher = trained.model
        save_file(_weights(trained.model), folder / WEIGHTS)
        return _account(trained)

    def compress(self, name: str, tell: _Step) -> dict[str, Any]:
        """One stage: a smaller network, taught by the one that `train` ended with."""
        from safetensors.torch import save_file

        settings, place = self.settings, self.stages.index(name)
        before = self._network(self.stages[place - 1] if place else "train")
        asked = compress.stage(name, settings.recipe, self.vocabulary, self.teacher, before)
        self.run.clear(CHECKPOINT)
        trained = train(
            self.sequences,
            self.split,
            self.vocabulary,
            asked.recipe,
            seed=settings.seed,
            progress=tell,
            weights=asked.weights,
            checkpoints=self._checkpoints(
                f"{name} {asdict(settings.recipe)} {settings.seed} {sha256_of(self.run.folder / WEIGHTS)}"
            ),
            lesson=asked.lesson,
        )
        save_file(_weights(trained.model), self.run.folder / f"{name}.safetensors")
        return _account(trained) | compress.figures(trained.model)

    def evaluate(self, _: _Step) -> dict[str, Any]:
        of_model = judge(self.model, self.sequences, self.split, self.vocabulary)
        return of_model | {"lists": fuse_counts(self.model, self.sequences, self.split, self.vocabulary)}

    def export(self, _: _Step) -> dict[str, Any]:
        self.run.clear(_STAGING, _TEACHER_STAGING)
        self.staging.mkdir()
        rounded = self.settings.recipe.compression.quantize
        graphs = stage(self.model, self.vocabulary, self.staging, rounded=rounded)
        parity = check_parity(self.model, self.staging)
        if not self.stages:
            return {"graphs": graphs, "parity": parity}
        whole = self.run.folder / _TEACHER_STAGING
        whole.mkdir()
        stage(self.teacher, self.vocabulary, whole)
        if self.model.shape != self.teacher.shape:
            half = {name: tensor.half() for name, tensor in _weights(self.teacher).items()}
            write(self.staging / TEACHER, half)
        return {"graphs": graphs, "parity": parity, "compression": self._compression(whole)}

    def _compression(self, whole: Path) -> dict[str, Any]:
        """What was done, and what it made smaller; times are the gate's, as no two clocks agree."""
        before, after = (
            compress.figures(network) | {"bytes": sum(file.stat().st_size for file in folder.iterdir())}
            for network, folder in ((self.teacher, whole), (self.model, self.staging))
        )
        plan = asdict(self.settings.recipe.compression)
        return {"plan": plan, "stages": list(self.stages), "before": before, "after": after}

    def gate(self) -> dict[str, Any]:
        """The verdict. A refusal is kept, too; with `force` the same checks count as passed."""
        verdict = Verdict.model_validate(self.step("gate", self.check))
        if verdict.passed:
            return verdict.model_dump()
        if self.settings.force is None:
            raise GateRefused(verdict)
        return verdict.model_copy(update={"forced": True}).model_dump()

    def check(self, _: _Step) -> dict[str, Any]:
        serving: tuple[Artefact, Judged] | None = None
        if parent := self._read["parent"]:
            artefact = self.registry.open(parent)
            known = Judged(
                ArtefactScorer(artefact), artefact.vocabulary(), artefact.manifest.model.max_history
            )
            serving = artefact, known
        candidate = self._judged(self.staging)
        whole = self.run.folder / _TEACHER_STAGING
        teacher = (whole, self._judged(whole)) if self.stages else None
        limits = self.settings.limits or GateLimits()
        return gate.judge(
            candidate, self.staging, serving, self.sequences, self.split, limits, teacher=teacher
        ).model_dump()

    def _judged(self, folder: Path) -> Judged:
        scorer = GraphScorer(
            {graph: (folder / f"{graph}.onnx").read_bytes() for graph in ("encode", "rank")},
            read_item_table((folder / ITEM_TABLE).read_bytes()),
        )
        return Judged(scorer, self.vocabulary, self.teacher.shape.max_history)

    def publish(self, manifest: Manifest) -> dict[str, Any]:
        """Signed where there is a key, whole or not at all. A version that an earlier process of this run
        has published already is looked at instead."""
        if manifest.version not in self.registry.versions():
            with self.guard.changing():
                self.registry.publish(self.staging, manifest)
        artefact = self.registry.open(manifest.version)
        for name, entry in artefact.manifest.files.items():
            if sha256_of(self.staging / name) != entry.sha256:
                raise ArtefactInvalid(
                    f"{manifest.version} is there already, and its {name} is not this run's"
                )
        ArtefactScorer(artefact)
        return {
            "manifest_sha256": artefact.manifest_sha256,
            "signed_by": self.registry.signed_by(manifest.version),
        }

    def promote(self, version: str, alias: str) -> dict[str, Any]:
        with self.guard.changing():
            state = self.registry.promote(version, alias)
        return {"previous": state.previous.version if state.previous else None}

    # What steps need of those before -----------------------------------------------------------------

    @property
    def _read(self) -> dict[str, Any]:
        return self.run.state.steps["read"].result

    @cached_property
    def sequences(self) -> Sequences:
        return load_sequences(self.run.folder / _SEQUENCES)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.load(self.run.folder / VOCABULARY)

    @cached_property
    def split(self) -> Split:
        return split_sequences(self.sequences, self.settings.split)

    @cached_property
    def stages(self) -> tuple[str, ...]:
        return self.settings.recipe.compression.stages

    @cached_property
    def teacher(self) -> Recommender:
        """What training ended with."""
        return self._network("train")

    @cached_property
    def model(self) -> Recommender:
        """What is released: what the last stage made, where there is one."""
        return self._network(self.stages[-1]) if self.stages else self.teacher

    def _network(self, step: str) -> Recommender:
        from safetensors.torch import load_file

        file = WEIGHTS if step == "train" else f"{step}.safetensors"
        model = Recommender(ModelShape.model_validate(self.run.state.steps[step].result["shape"]))
        model.load_state_dict(load_file(self.run.folder / file))
        return model.eval()

    def _checkpoints(self, told: str) -> Checkpoints:
        """Of the training that is told from others by `told` and what is learnt from."""
        told = f"{told} {sha256_of(self.run.folder / _SEQUENCES)}"
        return Checkpoints(
            self.run.folder,
            hashlib.sha256(told.encode()).hexdigest(),
            every_s=self.settings.checkpoint_s,
            stopping=self.stopping,
        )

    def _serving_version(self) -> str | None:
        """Of the alias this run is for: what it is compared with, and may start from."""
        try:
            return self.registry.resolve(self.settings.alias or SERVING)
        except ArtefactInvalid:
            return None

    def _base(self, version: str | None) -> Artefact:
        if version is None:
            raise ArtefactInvalid("no version serves yet to start from: train without --from-serving first")
        artefact = self.registry.open(version)
        _, shape = trained_as(artefact.manifest)
        check_shape(shape, self.settings.recipe.shape(artefact.vocabulary()))
        return artefact

    def describe(
        self,
        read: dict[str, Any],
        trained: dict[str, Any],
        metrics: dict[str, Any],
        exported: dict[str, Any],
        verdict: Verdict,
    ) -> Manifest:
        """The manifest of what is about to be published; the registry adds the checksums."""
        settings, state = self.settings, self.run.state
        compression = exported.get("compression")
        made = {"compression": compression | self._kept(verdict)} if compression else {}
        whole = self.run.state.steps["train"].result
        return Manifest.model_validate(
            {
                "schema": 1,
                "version": state.version,
                "created_at": state.created_at,
                "parent": read["parent"],
                "model": trained["shape"],
                "graphs": exported["graphs"],
                # A run that was begun before there was a fusion has none.
                "fusion": metrics.get("lists", {}).get("weights"),
                "metrics": metrics
                | {"parity": exported["parity"], "gate": verdict.model_dump(mode="json")}
                | made,
                "data": read["data"]
                | {
                    "run": state.run,
                    "started_from": read["started_from"],
                    "split": settings.split,
                    "seed": settings.seed,
                    "goals": asdict(settings.recipe.goals),
                    "precision": settings.recipe.precision,
                    "processes": self.team.size,
                    "epochs": len(whole["epochs"]),
                    "best_epoch": whole["best"],
                    "stopped": whole["stopped"],
                }
                | ({"teacher": whole["shape"]} if trained["shape"] != whole["shape"] else {})
                | ({"forced": settings.force} if verdict.forced else {}),
                "git_revision": git_revision(),
                "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
            }
        )

    @staticmethod
    def _kept(verdict: Verdict) -> dict[str, Any]:
        """NDCG@10 of both heads, before and after, and the interval of the difference."""
        heads = {check.name.removesuffix(" kept"): check for check in verdict.checks if " kept" in check.name}
        return {
            name: {
                "before": check.figures["teacher"],
                "after": check.figures["candidate"],
                "difference": [check.value, check.figures["low"], check.figures["high"]],
            }
            for name, check in heads.items()
        }


class _Step:
    """A step's own voice."""

    def __init__(self, work: _Work, name: str) -> None:
        self._work, self._name = work, name

    def __call__(self, fraction: float, note: str) -> None:
        self._work.tell(self._name, fraction, note)

    def fraction(self, fraction: float) -> None:
        self(fraction, "")


def encode_vocabulary(log: Log, recipe: Recipe) -> Vocabulary:
    return build_vocabulary(
        log.sequences,
        max_items=recipe.max_items,
        item_buckets=recipe.item_buckets,
        category_buckets=recipe.category_buckets,
    )


def judge(model: Recommender, sequences: Sequences, split: Split, vocabulary: Vocabulary) -> dict[str, Any]:
    scorer = TorchScorer(model, row_categories(vocabulary))
    length = model.shape.max_history
    return evaluate(scorer, sequences, split, vocabulary, max_history=length, limit=JUDGED, count=False)


def fuse_counts(
    model: Recommender, sequences: Sequences, split: Split, vocabulary: Vocabulary
) -> dict[str, Any]:
    scorer = TorchScorer(model, row_categories(vocabulary))
    length = model.shape.max_history
    return fuse(scorer, sequences, split, vocabulary, max_history=length, limit=FUSED)


def stage(
    model: Recommender, vocabulary: Vocabulary, folder: Path, *, rounded: bool = False
) -> dict[str, str]:
    """Write every file of a version but the manifest; the names of the graphs. `rounded`: the model's
    tables are on their grid, and are written, as the item table is, in 8 bits."""
    graphs = export(model, folder, rounded=rounded)
    write(folder / WEIGHTS, _weights(model), rounded=rounded)
    vocabulary.save(folder / VOCABULARY)
    table = TorchScorer(model, row_categories(vocabulary)).item_table()
    if rounded:
        counted, step = codes(torch.from_numpy(table))
        write_item_table(folder / ITEM_TABLE, counted.numpy(), step.numpy()[:, 0])
    else:
        write_item_table(folder / ITEM_TABLE, table)
    return graphs


def _account(trained: Trained) -> dict[str, Any]:
    """What a step that trained says of it."""
    return {
        "shape": trained.model.shape.model_dump(),
        "epochs": [asdict(epoch) for epoch in trained.epochs],
        "best": trained.best,
        "stopped": trained.stopped,
    }


def save_sequences(sequences: Sequences, path: Path) -> None:
    """As an .npz without pickle."""
    columns = {name: getattr(sequences, name) for name in Sequences.__slots__}
    with path.open("wb") as file:
        np.savez(file, **columns)


def load_sequences(path: Path) -> Sequences:
    with np.load(path, allow_pickle=False) as columns:
        return Sequences(**{name: columns[name] for name in Sequences.__slots__})


def _weights(model: Recommender) -> dict[str, Any]:
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


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
