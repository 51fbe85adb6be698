"""How large the log, the catalogue and the networks of Table I are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from compression.retrieval.network import NetworkConfig
from compression.smaller.quantization import Grid


@dataclass(frozen=True, slots=True)
class Shape:
    """`kept_heads` and `kept_channels` are what structured pruning leaves of each layer; with a share of
    `pruned` of the table they make that share of all parameters. Bits are of the stored tables of Pruned +
    Quantized and of Distilled; all linear maps of both, and all of Quantized, have 8."""

    name: str
    items: int
    log_events: int
    log_users: int
    log_categories: int
    dim: int
    layers: int
    heads: int
    ffn: int
    kept_heads: int
    kept_channels: int
    student_dim: int
    student_layers: int
    student_heads: int
    student_ffn: int
    history: int = 100
    candidates: int = 50
    pruned: float = 0.4
    rounds: int = 3
    pruned_bits: int = 5
    student_bits: int = 4

    def config(self, items: int) -> NetworkConfig:
        return NetworkConfig(
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            ffn=self.ffn,
            activation="relu",
            max_history=self.history + 1,
            item_rows=items,
        )

    def student(self, items: int) -> NetworkConfig:
        return self.config(items).model_copy(
            update={
                "dim": self.student_dim,
                "layers": self.student_layers,
                "heads": self.student_heads,
                "ffn": self.student_ffn,
            }
        )


# 200,000 items in 160 dimensions are 32.0 M parameters, four layers 1.2 M. Five heads and 640 channels, so
# that three and 384 are 60 % to the dot.
FULL: Final = Shape(
    "full", 200_000, 2_000_000, 20_000, 2_000, 160, 4, 5, 640, 3, 384, 80, 2, 2, 160, pruned_bits=6
)
# What two cores train in minutes: half as wide, a fortieth of the catalogue.
SMALL: Final = Shape("small", 5_000, 200_000, 5_000, 100, 80, 4, 5, 320, 3, 192, 40, 2, 2, 80)
# What a test runs through in seconds.
QUICK: Final = Shape(
    "quick", 300, 6_000, 150, 10, 20, 2, 5, 40, 3, 24, 8, 1, 2, 16, history=20, candidates=20
)
SHAPES: Final = {shape.name: shape for shape in (FULL, SMALL, QUICK)}

EIGHT: Final = Grid(8, per_row=True)
