"""The processes of a training that torchrun has started."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from infra.retraining import STOPPED
from infra.retraining.work import asked_to_end

if TYPE_CHECKING:
    from compression.training.processes import Place


def place_of(device: str, processes: int, schedule: str | None) -> Place | None:
    """Where torchrun put this process, if it did; a usage error where that cannot be."""
    from compression.training.processes import ProcessesInvalid, torchrun_place

    try:
        place = torchrun_place()
    except ProcessesInvalid as error:
        raise click.UsageError(str(error)) from None
    if place is not None and schedule is not None:
        raise click.UsageError("a schedule starts processes of its own: --processes, without torchrun")
    if place is not None and processes > 1:
        raise click.UsageError("torchrun has started the processes already: leave out --processes")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise click.UsageError("torch finds no GPU here: --device cpu")
        # Sums on a GPU come out the same every time only with this, set before its first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return place


def assist(place: Place, device: str) -> None:
    """All that a process of torchrun's does whose rank is not 0."""
    from compression.training.checkpoint import Stopped
    from compression.training.processes import Launched

    try:
        with asked_to_end() as stopping, Launched(place, device) as team:
            team.assist(stopping)
    except Stopped:
        raise SystemExit(STOPPED) from None
    except RuntimeError as error:
        raise click.ClickException(f"process {place.rank} lost the one that leads: {error}") from None
