"""Where a training stands, on disk: weights as safetensors, the rest as JSON, nothing unpickled.

    state.json                 what is being trained, the epochs so far, which files hold what; replaced last
    last-<epoch>.safetensors   weights, running mean and optimizer after that epoch
    kept-<epoch>.safetensors   the weights of an epoch that may yet be chosen

A killed process goes on after the last whole epoch. Every epoch draws its randomness from the seed and
its own number, so there are no generators to keep.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import orjson
from torch import Tensor

from compression.errors import ArtefactInvalid
from compression.files import read_plain, write_whole

Weights = dict[str, Tensor]

STATE: Final = "state.json"
MAX_STATE_BYTES: Final = 2**22
MAX_WEIGHT_BYTES: Final = 2**32


class TrainingState:
    """The folder of one training. `of` says what is trained: a folder of something else is refused."""

    def __init__(self, folder: Path, of: dict[str, Any]) -> None:
        self._folder = folder
        self._of = orjson.loads(orjson.dumps(of))

    def load(self) -> tuple[dict[str, Any], Weights, dict[int, Weights]] | None:
        """The epochs' record, the tensors to go on from and the kept weights by epoch; None: start anew."""
        if not (self._folder / STATE).exists():
            return None
        try:
            found = orjson.loads(read_plain(self._folder / STATE, MAX_STATE_BYTES, str(self._folder)))
            of, record = found["of"], found["record"]
            last, kept = int(found["last"]), [int(epoch) for epoch in found["kept"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ArtefactInvalid(f"{self._folder / STATE}: {error}") from None
        if of != self._of:
            raise ArtefactInvalid(
                f"{self._folder} holds the state of another log, recipe or seed: name another folder"
            )
        return record, self._read(f"last-{last}"), {epoch: self._read(f"kept-{epoch}") for epoch in kept}

    def save(self, record: dict[str, Any], epoch: int, last: Weights, kept: dict[int, Weights]) -> None:
        """After a whole epoch. A file that is there already is not written again."""
        for number, weights in kept.items():
            if not self._path(f"kept-{number}").exists():
                self._write(f"kept-{number}", weights)
        self._write(f"last-{epoch}", last)
        state = {"of": self._of, "record": record, "last": epoch, "kept": list(kept)}
        write_whole(self._folder / STATE, orjson.dumps(state))
        needed = {self._path(f"last-{epoch}"), *(self._path(f"kept-{number}") for number in kept)}
        for path in self._folder.glob("*.safetensors"):
            if path not in needed:
                path.unlink()

    def _read(self, name: str) -> Weights:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors: Weights = load(read_plain(self._path(name), MAX_WEIGHT_BYTES, str(self._folder)))
        except SafetensorError as error:
            raise ArtefactInvalid(f"{self._path(name)}: {error}") from None
        return tensors

    def _write(self, name: str, tensors: Weights) -> None:
        from safetensors.torch import save

        write_whole(self._path(name), save({key: value.contiguous() for key, value in tensors.items()}))

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"
