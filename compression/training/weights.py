"""Weights of the network as a version keeps them: safetensors, tables in 8 bits where they were rounded.

NAME         f32, the tensor itself, or
NAME.codes   i8 [rows, d] and
NAME.step    f32 [rows, 1]: the tensor is their product
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from compression.smaller.quantization import Grid, quantize

TABLE_GRID: Final = Grid(8, per_row=True, symmetric=True)
TABLES: Final = ("items", "categories")
"""Modules that are rounded: all but a few thousand of a network's weights are theirs."""


def write(path: Path, weights: Mapping[str, Tensor], *, rounded: bool = False) -> None:
    """`rounded`: the tables are on their grid already and lose nothing."""
    stored: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if rounded and name.removesuffix(".weight") in TABLES:
            stored[f"{name}.codes"], stored[f"{name}.step"] = codes(tensor)
        else:
            stored[name] = tensor.detach().contiguous()
    save_file(stored, path)


def read(data: bytes) -> dict[str, Tensor]:
    """Every tensor in f32 by name; `ValueError` where the bytes hold none."""
    try:
        stored = load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    weights: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(".codes"):
            whole = name.removesuffix(".codes")
            if f"{whole}.step" not in stored:
                raise ValueError(f"{name} has no step")
            weights[whole] = tensor.float() * stored[f"{whole}.step"]
        elif not name.endswith(".step"):
            weights[name] = tensor.float()
    return weights


def codes(table: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [rows, d] and f32 [rows, 1] of a table."""
    made = quantize(table, TABLE_GRID)
    return made.codes.to(torch.int8), made.step
