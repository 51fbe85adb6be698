"""Retraining as ordered steps: read, train, evaluate, export, gate, publish, promote, announce.

Where the recipe asks for a smaller network, the stages of its compression come after train, and what they end
with is evaluated, exported and judged: beside the version that serves, and beside what training had made.

A run (`compression.retraining.runs`) that was killed goes on at its step (`compression.retraining.steps`).
Nothing is published unless the gate lets it; nothing is promoted by a process whose lease went to another.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression.evaluation.verdict import GateRefused, Verdict
from compression.releases.registry import Manifest
from compression.retraining.manifest import describe
from compression.retraining.runs import Run
from compression.retraining.settings import RetrainSettings
from compression.retraining.steps import STAGING, TEACHER_STAGING, Guard, Progress, Work
from compression.training.checkpoint import Stopped
from compression.training.processes import Local, Team


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
        begun = run or Run.begin(Path(folder), "once")
        with begun:
            work = _kind_of(settings)(
                settings, begun, progress, guard or _NoGuard(), stopping, team or Local()
            )
            try:
                return _all_steps(work, announce)
            except GateRefused as error:
                begun.end("refused", str(error))
                raise
            except Stopped:
                raise
            except Exception as error:
                begun.end("failed", f"{type(error).__name__}: {error}"[:2_000])
                raise


def _kind_of(settings: RetrainSettings) -> type[Work]:
    if settings.retrieval is None:
        return Work
    from compression.retraining.retrieval import RetrievalWork

    return RetrievalWork


def _all_steps(work: Work, announce: Announce | None) -> Retrained:
    run, settings = work.run, work.settings
    work.registry.check_publishing()
    work.step("read", work.read)
    work.step("train", work.train)
    for name in work.kept.stages:
        work.step(name, lambda tell, name=name: work.compress(name, tell))  # type: ignore[misc]
    work.step("evaluate", work.evaluate)
    work.step("export", work.export)
    verdict = Verdict.model_validate(work.gate())
    manifest = describe(settings, run.state, verdict, processes=work.team.size)
    published = work.step("publish", lambda _: work.publish(manifest))
    manifest = work.registry.manifest(manifest.version)
    path, digest = settings.registry / "versions" / manifest.version, published["manifest_sha256"]
    if settings.alias is not None:
        alias = settings.alias
        work.step("promote", lambda _: work.promote(manifest.version, alias))
    told: dict[str, Any] = {}
    if settings.alias is not None and announce is not None:
        say = announce
        told = work.step("announce", lambda _: {"error": say(manifest, digest, path)})
    run.end("published", f"forced: {settings.force}" if verdict.forced else "")
    work.kept.clear()
    run.clear(STAGING, TEACHER_STAGING)
    seconds = {name: step.seconds for name, step in run.state.steps.items()}
    announced = bool(told) and told["error"] is None
    return Retrained(manifest, digest, path, settings.alias, seconds, verdict, announced)
