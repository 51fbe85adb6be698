"""What is served: models by name and version, and the tensors each of them takes and gives.

The protocol calls a version a string; ours are those of the registry. An empty version asks for the one
that serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, Protocol

import numpy as np

from inference.errors import ModelNotFound
from inference.types import Priority, Tensors

Datatype = Literal["INT32", "INT64", "FP32"]
DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP32": np.dtype("<f4"),
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a model. A size that is free has a name, and is the same wherever the name stands.

    `low` and `high` bound the values, both included; `high` may be the name of a free size.
    """

    name: str
    datatype: Datatype
    sizes: tuple[int | str, ...]
    low: int | None = None
    high: int | str | None = None
    optional: bool = False

    @property
    def shape(self) -> list[int]:
        """As the protocol's metadata has it: -1 where the size is free."""
        return [size if isinstance(size, int) else -1 for size in self.sizes]


@dataclass(frozen=True, slots=True)
class Question:
    """What a model is asked: inputs checked against its specs, and the outputs wanted, at least one.
    `deadline_s` is on the event loop's clock; None is no deadline."""

    inputs: Tensors
    outputs: tuple[str, ...]
    priority: Priority = "normal"
    deadline_s: float | None = None


class Answer(NamedTuple):
    """The outputs wanted, and the version that they are of: two with a comma, where users of one request
    are in different arms of a canary."""

    outputs: Tensors
    version: str


class ServedModel(Protocol):
    """One version of one model. `most` holds the largest allowed value of each free size."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def platform(self) -> str: ...
    @property
    def inputs(self) -> Sequence[TensorSpec]: ...
    @property
    def outputs(self) -> Sequence[TensorSpec]: ...
    @property
    def most(self) -> Mapping[str, int]: ...

    async def infer(self, question: Question) -> Answer:
        """Raises `InferenceError`; cancelling it gives up the work."""
        ...


class Catalogue:
    """The models that are ready, changed and read on one event loop."""

    def __init__(self) -> None:
        self._models: dict[str, dict[str, ServedModel]] = {}
        self._routed: dict[str, ServedModel] = {}
        self._serving = ""

    @property
    def serving(self) -> str:
        """The version that an empty one stands for; empty while there is none."""
        return self._serving

    def add(self, models: Sequence[ServedModel]) -> None:
        for model in models:
            self._models.setdefault(model.name, {})[model.version] = model

    def route(self, model: ServedModel) -> None:
        """Let this model, which is of no one version, answer who asks for its name and no version."""
        self._routed[model.name] = model

    def serve(self, version: str) -> None:
        """Let the empty version stand for this one, which has been added."""
        if version not in self.versions():
            raise ModelNotFound(f"version {version!r} is not loaded")
        self._serving = version

    def remove(self, models: Sequence[ServedModel]) -> None:
        """From now on nobody finds these; who has found them keeps them."""
        for model in models:
            versions = self._models.get(model.name, {})
            # The same version may have been opened anew while this one was on its way out.
            if versions.get(model.version) is model:
                del versions[model.version]
        if self._serving not in self.versions():
            self._serving = ""

    def versions(self) -> list[str]:
        return sorted({version for versions in self._models.values() for version in versions})

    def versions_of(self, name: str) -> list[str]:
        return sorted(self._models.get(name, ()))

    def all(self) -> list[ServedModel]:
        return [model for versions in self._models.values() for model in versions.values()]

    def find(self, name: str, version: str = "") -> ServedModel:
        """The model, or `ModelNotFound` with what there is."""
        versions = self._models.get(name)
        if not versions:
            known = ", ".join(sorted(name for name, versions in self._models.items() if versions))
            raise ModelNotFound(f"no model is called {name[:64]!r}; there are {known or 'none yet'}")
        model = versions.get(version or self._serving)
        if not version and model is not None:
            return self._routed.get(name, model)
        if model is None:
            asked = f"version {version[:64]!r}" if version else "version that serves"
            raise ModelNotFound(f"{name} has no {asked}; loaded are {', '.join(sorted(versions))}")
        return model
