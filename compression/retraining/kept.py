"""What steps of a run need of those before, read from its folder when it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from typing import Any, Final

from compression.logs.dataset import Sequences, Split
from compression.logs.dataset import split as split_sequences
from compression.releases.provenance import sha256_of
from compression.releases.registry import VOCABULARY, ModelShape
from compression.retraining.runs import Run
from compression.retraining.settings import RetrainSettings
from compression.training.checkpoint import FILE as CHECKPOINT
from compression.training.checkpoint import Checkpoints
from compression.training.model import Recommender
from compression.training.warm_start import WEIGHTS
from compression.training.weights import write
from features.encoding import Vocabulary

_SEQUENCES: Final = "sequences.npz"


class Kept:
    """The files and results of one run. Whoever made something in this process has it without reading."""

    def __init__(self, run: Run, settings: RetrainSettings) -> None:
        self._run, self._settings = run, settings

    def keep_log(self, sequences: Sequences, vocabulary: Vocabulary) -> None:
        """Keep what was read."""
        vocabulary.save(self._run.folder / VOCABULARY)
        sequences.save(self._run.folder / _SEQUENCES)
        self.sequences, self.vocabulary = sequences, vocabulary

    def keep_network(self, step: str, model: Recommender) -> None:
        """Keep what a step has trained."""
        write(self._run.folder / _file(step), model.state_dict())
        if step == "train":
            self.teacher = model

    @property
    def read(self) -> dict[str, Any]:
        """What the step of that name said."""
        return self._run.state.steps["read"].result

    @cached_property
    def sequences(self) -> Sequences:
        return Sequences.load(self._run.folder / _SEQUENCES)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.load(self._run.folder / VOCABULARY)

    @cached_property
    def split(self) -> Split:
        return split_sequences(self.sequences, self._settings.split)

    @cached_property
    def stages(self) -> tuple[str, ...]:
        """Of the compression that the recipe asks for."""
        return self._settings.recipe.compression.stages

    @cached_property
    def teacher(self) -> Recommender:
        """What training ended with."""
        return self.network("train")

    @cached_property
    def model(self) -> Recommender:
        """What is released: what the last stage made, where there is one."""
        return self.network(self.stages[-1]) if self.stages else self.teacher

    def network(self, step: str) -> Recommender:
        """What a step has trained, in evaluation mode."""
        from safetensors.torch import load_file

        model = Recommender(ModelShape.model_validate(self._run.state.steps[step].result["shape"]))
        model.load_state_dict(load_file(self._run.folder / _file(step)))
        return model.eval()

    def checkpoints(self, told: str, stopping: Callable[[], bool]) -> Checkpoints:
        """Of the training that is told from others by `told` and what is learnt from."""
        told = f"{told} {sha256_of(self._run.folder / _SEQUENCES)}"
        return Checkpoints(
            self._run.folder,
            hashlib.sha256(told.encode()).hexdigest(),
            every_s=self._settings.checkpoint_s,
            stopping=stopping,
        )

    def clear(self) -> None:
        """Remove all of it but what steps said."""
        networks = (_file(step) for step in ("train", *self.stages))
        self._run.clear(_SEQUENCES, VOCABULARY, CHECKPOINT, *networks)


def _file(step: str) -> str:
    return WEIGHTS if step == "train" else f"{step}.safetensors"
