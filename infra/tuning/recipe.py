"""What can be chosen when a trained ranker is made smaller."""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal

from optuna import Trial
from pydantic import BaseModel, ConfigDict, Field

from compression.retrieval.network import NetworkConfig

STUDENT_HEADS: Final = 4
_STUDENT_SHARES: Final = (0.3, 0.4, 0.5, 0.6)  # of the Baseline's dimensions
_CHANNEL_SHARES: Final = (0.2, 0.4, 0.6, 0.8, 1.0)
_PIECE_WIDTHS: Final = (2, 4)  # values that a code of a table stands for
Bits = Annotated[int, Field(ge=2, le=8)]


class Recipe(BaseModel):
    """`shrunk`: the trained network with layers, heads and channels left out, the small weights of its
    table zero, its query, key and value maps of a lower rank (0: as they are), and only `distinct` of its
    layers with weights of their own (0: all). `student`: a narrower network that begins with the table's main
    directions. Both are then rounded and taught by the whole network. Of `splits` the table is product codes,
    as many bytes a row, instead of rounded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["shrunk", "student"]
    layers: Annotated[int, Field(ge=1, le=64)]
    heads: Annotated[int, Field(ge=1, le=64)]
    channels: Annotated[int, Field(ge=1, le=65536)]
    dim: Annotated[int, Field(ge=2, le=4096)]
    zeros: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rank: Annotated[int, Field(ge=0, le=4096)] = 0
    distinct: Annotated[int, Field(ge=0, le=64)] = 0
    splits: Annotated[int, Field(ge=0, le=4096)] = 0
    matrix_bits: Bits = 8
    table_bits: Bits = 8


def suggest(trial: Trial, whole: NetworkConfig) -> Recipe:
    """A recipe for a network of these sizes, as the study wants it tried."""
    matrix_bits = trial.suggest_int("matrix_bits", 4, 8)
    if trial.suggest_categorical("kind", ["shrunk", "student"]) == "student":
        share = trial.suggest_categorical("dim_share", _STUDENT_SHARES)
        dim = STUDENT_HEADS * max(1, round(share * whole.dim / STUDENT_HEADS))
        return Recipe(
            kind="student",
            layers=trial.suggest_int("student_layers", 1, max(1, whole.layers - 1)),
            heads=STUDENT_HEADS,
            channels=4 * dim,
            dim=dim,
            matrix_bits=matrix_bits,
            **_table(trial, dim, zeros=False),
        )
    heads = trial.suggest_int("heads", 1, whole.heads)
    layers = trial.suggest_int("layers", 1, whole.layers)
    width = heads * whole.dim // whole.heads
    attention = trial.suggest_categorical("attention", ["full", "low-rank"])
    pairs = trial.suggest_categorical("weights", ["own", "shared by pairs"]) == "shared by pairs"
    return Recipe(
        kind="shrunk",
        layers=layers,
        heads=heads,
        channels=round(trial.suggest_categorical("channel_share", _CHANNEL_SHARES) * whole.ffn),
        dim=whole.dim,
        # The rank at which two maps have half the weights of one.
        rank=max(1, width * whole.dim // (2 * (width + whole.dim))) if attention == "low-rank" else 0,
        distinct=(layers + 1) // 2 if pairs and layers > 1 else 0,
        matrix_bits=matrix_bits,
        **_table(trial, whole.dim, zeros=True),
    )


def _table(trial: Trial, dim: int, *, zeros: bool) -> dict[str, Any]:
    """How the table is stored: fields of a recipe."""
    if trial.suggest_categorical("table", ["rounded", "product codes"]) == "product codes":
        width = trial.suggest_categorical("piece_width", _PIECE_WIDTHS)
        return {"splits": dim // math.gcd(dim, width)}
    stored: dict[str, Any] = {"table_bits": trial.suggest_int("table_bits", 2, 8)}
    return stored | ({"zeros": trial.suggest_float("zeros", 0.0, 0.6, step=0.1)} if zeros else {})
