"""A small retraining that a child process can be given, and killed at."""

from dataclasses import replace
from pathlib import Path

import torch

from compression.logs.synth import SynthSettings, synthesize, write_log
from compression.releases.registry import Registry
from compression.retraining.pipeline import retrain
from compression.retraining.runs import Run
from compression.retraining.settings import RetrainSettings
from compression.training.processes import Local
from compression.training.train import TINY

RECIPE = replace(TINY, dim=16, ffn=32, epochs=4, patience=4, max_minutes=30.0, judge_limit=100)


def short_log(path: Path) -> Path:
    write_log(path, synthesize(SynthSettings(3_000, 150, 200, 10, seed=3)))
    return path


def settings(folder: Path, log: Path, **changes):
    return RetrainSettings(log, folder / "models", **({"recipe": RECIPE, "checkpoint_s": 0.0} | changes))


def work(folder: Path, log: Path, said=None, processes=1, **changes) -> None:
    """The run "night" in `folder`, from where it stands; `said` is set once the work begins."""
    torch.set_num_threads(1)
    run = Run.begin(folder / "runs", "night")
    if said is not None:
        said.set()
    retrain(settings(folder, log, **changes), run=run, team=Local(processes))


def result(folder: Path):
    """What was published: the checksum of every file, and the figures that no clock has a part in."""
    (version,) = Registry(folder / "models").versions()
    manifest = Registry(folder / "models").open("serving").manifest
    assert manifest.version == version
    metrics = {name: figure for name, figure in manifest.metrics.items() if name != "gate"}
    data = {name: value for name, value in manifest.data.items() if name != "run"}
    return {name: entry.sha256 for name, entry in manifest.files.items()}, metrics, data
