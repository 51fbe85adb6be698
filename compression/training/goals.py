"""What a training is for: how much a view, a cart, a favourite and a purchase weigh as targets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from topics.messages import BEHAVIORS

HIGHEST = 1e4


@dataclass(frozen=True, slots=True)
class Goals:
    """The weight of a target in both losses by what its user did. Means are weighted, so only proportions
    count. `ValueError` where a weight is no number from 0 to `HIGHEST`, or all are 0."""

    pv: float = 1.0
    cart: float = 1.0
    fav: float = 1.0
    buy: float = 1.0

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            if not (math.isfinite(weight) and 0 <= weight <= HIGHEST):
                raise ValueError(f"the weight of {name} is a number from 0 to {HIGHEST:g}, not {weight}")
        if not any(asdict(self).values()):
            raise ValueError("goals that all weigh 0 leave nothing to learn")

    @classmethod
    def parse(cls, words: Iterable[str]) -> Self:
        """From NAME=WEIGHT words, as in buy=4; what is not named weighs 1."""
        weights: dict[str, float] = {}
        for word in words:
            name, _, weight = word.partition("=")
            if name not in BEHAVIORS:
                raise ValueError(f"{word!r}: a goal is one of {', '.join(BEHAVIORS)} and its weight: buy=4")
            if name in weights:
                raise ValueError(f"{name} is given twice")
            try:
                weights[name] = float(weight)
            except ValueError:
                raise ValueError(f"{word!r}: a weight is a number, as in buy=4") from None
        return cls(**weights)

    @classmethod
    def of(cls, told: Self | Mapping[str, float]) -> Self:
        """From what JSON makes of goals, or goals themselves."""
        return cls(**told) if isinstance(told, Mapping) else told

    @property
    def alike(self) -> bool:
        """Whether every target weighs 1."""
        return all(weight == 1 for weight in asdict(self).values())

    def by_row(self) -> npt.NDArray[np.float32]:
        """[behaviour rows of `features.encoding`]: padding and candidates weigh nothing."""
        return np.array([0.0, *(getattr(self, name) for name in BEHAVIORS), 0.0], np.float32)
