"""The steps of one run of a retraining, each by itself: what it makes, and what it says when it has.

`compression.retraining.pipeline` puts them in order. What a step makes is kept in the run's folder
(`compression.retraining.kept`), so that a run that was killed goes on at its step, training within it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from compression.evaluation import gate
from compression.evaluation.evaluate import evaluate
from compression.evaluation.fusion import fuse
from compression.evaluation.scoring import (
    ArtefactScorer,
    GraphScorer,
    Scorer,
    TorchScorer,
    row_categories,
)
from compression.evaluation.verdict import GateLimits, GateRefused, Judged, Verdict
from compression.logs.dataset import build_vocabulary
from compression.logs.sources import LogFile
from compression.releases.provenance import sha256_of
from compression.releases.registry import (
    ITEM_TABLE,
    SERVING,
    Artefact,
    ArtefactInvalid,
    Manifest,
    Registry,
    read_item_table,
)
from compression.retraining.kept import Kept
from compression.retraining.runs import Run
from compression.retraining.settings import RetrainSettings
from compression.retraining.staging import stage
from compression.smaller import compress
from compression.smaller.plan import Compression
from compression.training.checkpoint import FILE as CHECKPOINT
from compression.training.checkpoint import Stopped
from compression.training.export import check_parity
from compression.training.processes import Team
from compression.training.train import Recipe, Trained, train
from compression.training.warm_start import TEACHER, WEIGHTS, check_shape, grown, starting_weights, trained_as
from compression.training.weights import write

_BEFORE, _AFTER = ("read", "train"), ("evaluate", "export", "gate", "publish", "promote", "announce")
STEPS = (*_BEFORE, *_AFTER)
JUDGED = 2_000  # test targets; `tailrace evaluate --limit` judges by more
FUSED = 1_000  # targets of validation, and of the test, that the weights of online counts are judged by
STAGING = "staging"
TEACHER_STAGING = "staging-teacher"

Progress = Callable[[str, float, str], None]  # step, fraction of the step, what it is doing


def steps_of(recipe: Recipe) -> tuple[str, ...]:
    """Every step of a run, in order."""
    return (*_BEFORE, *recipe.compression.stages, *_AFTER)


class Guard(Protocol):
    """Says whether this process may still change the registry; raises where it may not."""

    def check(self) -> None: ...
    def changing(self) -> AbstractContextManager[None]: ...


class Work:
    """The steps of one run."""

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
        self.kept = Kept(run, settings)
        self.staging = run.folder / STAGING

    def step(self, name: str, work: Callable[[StepVoice], dict[str, Any]]) -> dict[str, Any]:
        """What the step said, now or in an earlier process."""
        found = self.run.done(name)
        if found is not None:
            return found
        self.tell(name, 0.0, "")
        began_s = time.monotonic()
        result = work(StepVoice(self, name))
        self.run.finish(name, time.monotonic() - began_s, result)
        self.tell(name, 1.0, "")
        return self.run.state.steps[name].result

    def tell(self, name: str, fraction: float, note: str) -> None:
        """How far it is; the place where a run ends that is to end, or that has lost its lease."""
        self.guard.check()
        self.run.tell(name, fraction, note)
        self._progress(name, fraction, note)
        # Training keeps its state first, and says so itself.
        trains = name == "train" or name in self.kept.stages
        if self.stopping() and (not trains or fraction in (0.0, 1.0)):
            raise Stopped(f"asked to end during {name}")

    # Steps -----------------------------------------------------------------------------------------

    def read(self, tell: StepVoice) -> dict[str, Any]:
        settings = self.settings
        source = LogFile(settings.log) if isinstance(settings.log, Path) else settings.log
        log = source.read(settings.max_events, tell.fraction)
        recipe = settings.recipe
        vocabulary = build_vocabulary(
            log.sequences,
            max_items=recipe.max_items,
            item_buckets=recipe.item_buckets,
            category_buckets=recipe.category_buckets,
        )
        parent = self._serving_version()
        if settings.from_serving:
            before = self._base(parent)
            vocabulary = grown(before.vocabulary(), vocabulary, recipe.max_items)
        self.kept.keep_log(log.sequences, vocabulary)
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

    def train(self, tell: StepVoice) -> dict[str, Any]:
        settings, kept = self.settings, self.kept
        weights = None
        if started_from := kept.read["started_from"]:
            base = self._base(started_from)
            file, _ = trained_as(base.manifest)
            weights = starting_weights(base, base.vocabulary(), kept.vocabulary, file)
        recipe = replace(settings.recipe, compression=Compression())
        with self.team.joined() as group:
            trained = train(
                kept.sequences,
                kept.split,
                kept.vocabulary,
                recipe,
                seed=settings.seed,
                progress=tell,
                weights=weights,
                checkpoints=kept.checkpoints(
                    f"{asdict(recipe)} {settings.seed} {started_from} processes {group.size}", self.stopping
                ),
                group=group,
            )
        kept.keep_network("train", trained.model)
        return _account(trained)

    def compress(self, name: str, tell: StepVoice) -> dict[str, Any]:
        """One stage: a smaller network, taught by the one that `train` ended with."""
        settings, kept = self.settings, self.kept
        before = kept.network(("train", *kept.stages)[kept.stages.index(name)])
        asked = compress.stage(name, settings.recipe, kept.vocabulary, kept.teacher, before)
        self.run.clear(CHECKPOINT)
        trained = train(
            kept.sequences,
            kept.split,
            kept.vocabulary,
            asked.recipe,
            seed=settings.seed,
            progress=tell,
            weights=asked.weights,
            checkpoints=kept.checkpoints(
                f"{name} {asdict(settings.recipe)} {settings.seed} {sha256_of(self.run.folder / WEIGHTS)}",
                self.stopping,
            ),
            lesson=asked.lesson,
        )
        kept.keep_network(name, trained.model)
        return _account(trained) | compress.figures(trained.model)

    def evaluate(self, _: StepVoice) -> dict[str, Any]:
        kept, length = self.kept, self.longest
        of_what = (self.scorer(), kept.sequences, kept.split, kept.vocabulary)
        judged = evaluate(*of_what, max_history=length, limit=JUDGED, count=False)
        return judged | {"lists": fuse(*of_what, max_history=length, limit=FUSED)}

    @property
    def longest(self) -> int:
        """How many events the trained network reads."""
        return self.kept.teacher.shape.max_history

    def scorer(self) -> Scorer:
        """What was trained, as evaluation sees it."""
        return TorchScorer(self.kept.model, row_categories(self.kept.vocabulary))

    def export(self, _: StepVoice) -> dict[str, Any]:
        kept = self.kept
        self.run.clear(STAGING, TEACHER_STAGING)
        self.staging.mkdir()
        rounded = self.settings.recipe.compression.quantize
        graphs = stage(kept.model, kept.vocabulary, self.staging, rounded=rounded)
        parity = check_parity(kept.model, self.staging)
        if not kept.stages:
            return {"graphs": graphs, "parity": parity}
        whole = self.run.folder / TEACHER_STAGING
        whole.mkdir()
        stage(kept.teacher, kept.vocabulary, whole)
        if kept.model.shape != kept.teacher.shape:
            half = {name: tensor.half() for name, tensor in kept.teacher.state_dict().items()}
            write(self.staging / TEACHER, half)
        return {"graphs": graphs, "parity": parity, "compression": self._compression(whole)}

    def _compression(self, whole: Path) -> dict[str, Any]:
        """What was done, and what it made smaller; times are the gate's, as no two clocks agree."""
        before, after = (
            compress.figures(network) | {"bytes": sum(file.stat().st_size for file in folder.iterdir())}
            for network, folder in ((self.kept.teacher, whole), (self.kept.model, self.staging))
        )
        plan = asdict(self.settings.recipe.compression)
        return {"plan": plan, "stages": list(self.kept.stages), "before": before, "after": after}

    def gate(self) -> dict[str, Any]:
        """The verdict. A refusal is kept, too; with `force` the same checks count as passed."""
        verdict = Verdict.model_validate(self.step("gate", self.check))
        if verdict.passed:
            return verdict.model_dump()
        if self.settings.force is None:
            raise GateRefused(verdict)
        return verdict.model_copy(update={"forced": True}).model_dump()

    def check(self, _: StepVoice) -> dict[str, Any]:
        serving: tuple[Artefact, Judged] | None = None
        kept = self.kept
        if parent := kept.read["parent"]:
            artefact = self.registry.open(parent)
            length = artefact.manifest.model.max_history
            serving = artefact, Judged(ArtefactScorer(artefact), artefact.vocabulary(), length)
        candidate = self._judged(self.staging)
        whole = self.run.folder / TEACHER_STAGING
        teacher = (whole, self._judged(whole)) if kept.stages else None
        limits = self.settings.limits or GateLimits()
        return gate.judge(
            candidate, self.staging, serving, kept.sequences, kept.split, limits, teacher=teacher
        ).model_dump()

    def _judged(self, folder: Path) -> Judged:
        scorer = GraphScorer(
            {graph: (folder / f"{graph}.onnx").read_bytes() for graph in ("encode", "rank")},
            read_item_table((folder / ITEM_TABLE).read_bytes()),
        )
        return Judged(scorer, self.kept.vocabulary, self.longest)

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

    def _serving_version(self) -> str | None:
        """Of the alias this run is for: what it is compared with, and may start from."""
        try:
            return self.registry.resolve(self.settings.alias or SERVING)
        except ArtefactInvalid:
            return None

    def _base(self, version: str | None) -> Artefact:
        if version is None:
            raise ArtefactInvalid("no version serves yet to start from: train without --from-serving first")
        artefact = self.registry.open(version, kind="ranking")
        _, shape = trained_as(artefact.manifest)
        check_shape(shape, self.settings.recipe.shape(artefact.vocabulary()))
        return artefact


class StepVoice:
    """A step's own voice."""

    def __init__(self, work: Work, name: str) -> None:
        self._work, self._name = work, name

    def __call__(self, fraction: float, note: str) -> None:
        self._work.tell(self._name, fraction, note)

    def fraction(self, fraction: float) -> None:
        self(fraction, "")


def _account(trained: Trained) -> dict[str, Any]:
    """What a step that trained says of it."""
    return {
        "shape": trained.model.shape.model_dump(),
        "epochs": [asdict(epoch) for epoch in trained.epochs],
        "best": trained.best,
        "stopped": trained.stopped,
    }
