"""A small log and a model trained on it, made once per run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

SYNTH = {"events": 6_000, "users": 300, "items": 300, "categories": 10, "seed": 3}


def small_log(path: Path) -> Path:
    """A synthetic log of 6,000 events."""
    from compression.logs.synth import SynthSettings, synthesize, write_log

    write_log(path, synthesize(SynthSettings(**SYNTH)))
    return path


def small_registry(folder: Path) -> Path:
    """A registry whose `serving` alias is a one-epoch model of the small log."""
    from compression.retraining.pipeline import retrain
    from compression.retraining.settings import RetrainSettings
    from compression.training.train import TINY

    log = small_log(folder / "clicks.csv")
    retrain(RetrainSettings(log=log, registry=folder / "models", recipe=replace(TINY, epochs=1)))
    return folder / "models"
