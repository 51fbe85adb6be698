"""Training that was killed goes on where it stood, to the weights it would have had.

    checkpoint.safetensors    weights, moments of the optimizer, torch's random state; numbers in its header

One file, replaced whole. A step is repeated bit for bit because everything that decides it is kept: the
weights, the optimizer, both random states, and the random state of the epoch's start, from which the order
of its windows is drawn again. That holds on one build of torch with one number of threads (`identity`), and
where the recipe's minutes do not end the training: a clock cannot be repeated.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from compression.files import write_whole
from compression.training.group import ALONE, Group

FILE: Final = "checkpoint.safetensors"
EVERY_S: Final = 20.0
# A save takes as long as its file is large: of the time of training it has at most a twentieth.
_SHARE: Final = 20

log = logging.getLogger(__name__)


class Stopped(RuntimeError):
    """The process was asked to end; what was done so far is kept."""


@dataclass(slots=True)
class Standing:
    """Where training stands between two steps. `kept` holds weights beside those in training, by what
    they are; `done` one dict of plain numbers per finished epoch."""

    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0])
    seconds: float = 0.0
    done: list[dict[str, Any]] = field(default_factory=list)
    best: int = -1
    epoch_rng: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def begin_epoch(self, rng: np.random.Generator) -> None:
        """Note the random state, or go back to that of the epoch's start where it was left half way."""
        if self.step:
            rng.bit_generator.state = self.epoch_rng
        else:
            self.epoch_rng = copy.deepcopy(dict(rng.bit_generator.state))

    def end_epoch(self) -> None:
        self.epoch, self.step, self.sums = self.epoch + 1, 0, [0.0, 0.0]


class Checkpoints:
    """One training's checkpoint; without a folder nothing is kept. What another `identity` left behind is
    not taken up. Once `stopping` says so, in any process of a group, the state is kept and `Stopped` is
    raised in all of them."""

    def __init__(
        self,
        folder: Path | None = None,
        identity: str = "",
        *,
        every_s: float = EVERY_S,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._path = folder / FILE if folder else None
        self._identity = f"{identity} torch {torch.__version__} threads {torch.get_num_threads()}"
        self._pause_s = self._every_s = every_s
        self._stopping = stopping
        self._saved_s = time.monotonic()
        self._resumed_rng: dict[str, Any] | None = None

    def restore(
        self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], group: Group = ALONE
    ) -> Standing:
        """What was kept, put into the model, the optimizers and torch's generator; a fresh start where
        there is nothing, or nothing of this training. The first process reads it for all of a group."""
        told, tensors = group.handed(*(self._read() if group.leads else ({}, {})))
        if not told:
            return Standing()
        parts = _apart(tensors)
        model.load_state_dict(parts.pop("model"))
        kept_groups = told.pop("groups")
        for place, optimizer in enumerate(optimizers):
            groups = optimizer.state_dict()["param_groups"]
            for ours, kept in zip(groups, kept_groups[place], strict=True):
                ours.update(
                    {name: tuple(value) if name == "betas" else value for name, value in kept.items()}
                )
            moments: dict[int, dict[str, Any]] = {}
            for name, tensor in parts.pop(f"optimizer {place}", {}).items():
                number, _, moment = name.partition("/")
                # A count of steps that is a plain number to its optimizer.
                plain = tensor.ndim == 0 and not tensor.is_floating_point()
                moments.setdefault(int(number), {})[moment] = int(tensor) if plain else tensor
            optimizer.load_state_dict({"state": moments, "param_groups": groups})
        torch.set_rng_state(parts.pop("random")["torch"])
        self._resumed_rng = told.pop("rng")
        return Standing(**told, kept=parts)

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Numbers and tensors of the file; nothing where it is not of this training."""
        if self._path is None or not self._path.is_file():
            return {}, {}
        try:
            with safe_open(self._path, framework="pt") as file:
                told = json.loads((file.metadata() or {}).get("standing", "{}"))
                if told.pop("identity", None) != self._identity:
                    log.warning("%s is of another training: this one starts anew", self._path)
                    return {}, {}
                return told, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            log.warning("%s cannot be read (%s): training starts anew", self._path, error)
            return {}, {}

    def resume_rng(self, rng: np.random.Generator) -> None:
        """To be called once an interrupted epoch's windows are drawn: from here on as at the checkpoint."""
        if self._resumed_rng is not None:
            rng.bit_generator.state = self._resumed_rng
            self._resumed_rng = None

    def asked_to_end(self) -> bool:
        """To be asked once a step, and told to `offer` for the whole group."""
        return self._stopping()

    def offer(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        rng: np.random.Generator,
        at: Standing,
        *,
        ends: bool = False,
    ) -> None:
        """Keep the state if the last time is long enough ago, or if the training `ends` here."""
        if ends or time.monotonic() - self._saved_s >= self._pause_s:
            self.keep(model, optimizers, rng, at)
        if ends:
            raise Stopped("asked to end during training")

    def keep(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        rng: np.random.Generator,
        at: Standing,
    ) -> None:
        """Keep the state now."""
        if self._path is None:
            return
        began_s = time.monotonic()
        write_whole(self._path, _packed(model, optimizers, rng, at, self._identity))
        self._saved_s = time.monotonic()
        self._pause_s = max(self._every_s, _SHARE * (self._saved_s - began_s))


def _packed(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    rng: np.random.Generator,
    at: Standing,
    identity: str,
) -> bytes:
    """The whole state as the bytes of a safetensors file."""
    states = [optimizer.state_dict() for optimizer in optimizers]
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for place, state in enumerate(states):
        for number, moments in state["state"].items():
            for name, value in moments.items():
                tensors[f"optimizer {place}/{number}/{name}"] = torch.as_tensor(value)
    for what, weights in at.kept.items():
        tensors |= {f"{what}/{name}": tensor for name, tensor in weights.items()}
    tensors["random/torch"] = torch.get_rng_state()
    told = {
        "identity": identity,
        **{name: getattr(at, name) for name in Standing.__slots__ if name != "kept"},
        "rng": rng.bit_generator.state,
        "groups": [
            [
                {name: value for name, value in group.items() if name != "params"}
                for group in state["param_groups"]
            ]
            for state in states
        ],
    }
    whole = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    packed: bytes = save(whole, {"standing": json.dumps(told)})
    return packed


@contextmanager
def repeatable() -> Iterator[None]:
    """Sums in one order: without it two trainings of one seed differ in the last bits."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _apart(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """By the part of the name before its first slash."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = tensor
    return parts
