"""What a retraining was asked for, as its run keeps it: enough to take it up or repeat it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

from compression.retraining.runs import Run, RunInvalid, runs
from compression.retraining.settings import RetrainSettings
from compression.retrieval.recipe import RetrievalRecipe
from compression.smaller.plan import Compression
from compression.training.train import Recipe
from infra.retraining.topic_log import Bounds, TopicLog, bounds_now

EARLIEST: Final = "earliest"
LAST: Final = "last"
NOW: Final = "now"


class Job(BaseModel):
    """A run's spec. Exactly one of `log` and `bounds` says what is learnt from."""

    model_config = ConfigDict(frozen=True)

    registry: str
    alias: str | None
    recipe: dict[str, Any]
    retrieval: RetrievalRecipe | None = None
    split: Literal["leave-one-out", "temporal"]
    seed: int
    max_events: int
    from_serving: bool = False
    processes: int = 1
    log: str | None = None
    bounds: Bounds | None = None

    @classmethod
    def of(cls, run: Run) -> Job:
        """The job of a run that was begun by this command."""
        if not run.state.spec:
            raise RunInvalid(f"run {run.state.run} does not say what it was asked for")
        return cls.model_validate(run.state.spec)

    @property
    def compression(self) -> Compression:
        """None in runs of before there was any."""
        return Compression.of(self.recipe.get("compression", {}))

    def settings(self, bootstrap: str, force: str | None = None) -> RetrainSettings:
        """`bootstrap` is where the topic is now: not a part of what was asked for."""
        return RetrainSettings(
            log=TopicLog(bootstrap, self.bounds) if self.bounds else Path(str(self.log)),
            registry=Path(self.registry),
            recipe=Recipe.of(self.recipe),
            retrieval=self.retrieval,
            split=self.split,
            seed=self.seed,
            max_events=self.max_events,
            alias=self.alias,
            from_serving=self.from_serving,
            force=force,
        )


def job(  # the command's options, as they are
    *,
    log: Path | None,
    bounds: Bounds | None,
    registry: Path,
    alias: str | None,
    recipe: Recipe,
    retrieval: RetrievalRecipe | None = None,
    split: Literal["leave-one-out", "temporal"],
    seed: int,
    max_events: int,
    from_serving: bool,
    processes: int = 1,
) -> Job:
    """Absolute paths, so that it can be taken up from another folder."""
    return Job(
        registry=str(registry.resolve()),
        alias=alias,
        recipe=asdict(recipe),
        retrieval=retrieval,
        split=split,
        seed=seed,
        max_events=max_events,
        from_serving=from_serving,
        processes=processes,
        log=str(log.resolve()) if log else None,
        bounds=bounds,
    )


def compressed(run: Run, plan: Compression) -> Job:
    """The job of a run that has not published, to be gone on with from the network that was trained: what
    came of compressing it otherwise is forgotten."""
    asked = Job.of(run)
    if plan == asked.compression:
        return asked
    if asked.retrieval is not None:
        raise RunInvalid(
            f"run {run.state.run} trains a retrieval network, which is released as it is trained"
        )
    with run:
        if run.done("publish") is not None:
            raise RunInvalid(f"run {run.state.run} has published its version: begin another")
        for step in set(run.state.steps) - {"read", "train"}:
            run.forget(step)
        asked = asked.model_copy(update={"recipe": asked.recipe | {"compression": asdict(plan)}})
        run.state.spec = asked.model_dump(mode="json")
        run.save()
    return asked


def topic_bounds(root: Path, bootstrap: str, topic: str, since: str, until: str) -> Bounds:
    """`since`: earliest, last (where the latest published run of the topic ended; earliest where there is
    none) or a run's name (where it ended). `until`: now, or a run's name (where it ended)."""
    before = _bounds_of(root, topic, since)
    found = bounds_now(bootstrap, topic, before)
    if until != NOW:
        last = _bounds_of(root, topic, until)
        if last is None or last.epoch != found.epoch:
            raise RunInvalid(f"run {until} did not read {topic} as it is now")
        found = found.model_copy(update={"end": last.end, "clock_s": last.clock_s})
    return found


def _bounds_of(root: Path, topic: str, name: str) -> Bounds | None:
    if name == EARLIEST:
        return None
    if name != LAST:
        bounds = Job.of(Run.find(root, name)).bounds
        if bounds is None or bounds.topic != topic:
            raise RunInvalid(f"run {name} did not read the topic {topic}")
        return bounds
    for run in reversed(runs(root)):
        if run.state.outcome == "published" and run.state.spec:
            bounds = Job.of(run).bounds
            if bounds is not None and bounds.topic == topic:
                return bounds
    return None
