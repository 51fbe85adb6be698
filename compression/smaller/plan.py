"""What a retraining makes of its network once it is trained: which steps, and how far each goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Compression:
    """Steps that are off unless they are asked for: distil into a student, take feed-forward channels
    away in rounds, round tables to 8 bits; in this order.

    Sizes of the student, and the channels that pruning keeps, are shares of what was there before.
    `…_share` is how long a step trains, by the recipe's epochs and minutes; 0 does not train.
    """

    distil: bool = False
    student_dim: float = 0.75
    student_layers: float = 1.0
    student_ffn: float = 0.5
    student_share: float = 0.5
    maps: float = 0.1
    """Weight of the attention maps' divergence (formula 3) in a lesson."""
    opinions: float = 1.0
    """Weight of what the teacher says of candidates and the catalogue."""
    prune: bool = False
    kept_channels: float = 0.5
    rounds: int = 3
    round_share: float = 0.2
    quantize: bool = False
    aware_share: float = 0.0

    @classmethod
    def of(cls, told: dict[str, Any]) -> Compression:
        """From the JSON of `dataclasses.asdict`."""
        return cls(**told)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the steps, in order."""
        rounds = [f"prune-{number}" for number in range(1, self.rounds + 1)] if self.prune else []
        return (*(["distil"] if self.distil else []), *rounds, *(["quantize"] if self.quantize else []))


NONE: Final = Compression()
PLANS: Final = {
    "none": NONE,
    "distil": Compression(distil=True),
    "prune": Compression(prune=True),
    "quantize": Compression(quantize=True),
    "prune-quantize": Compression(prune=True, quantize=True),
    "all": Compression(distil=True, student_ffn=1.0, prune=True, quantize=True),
}
