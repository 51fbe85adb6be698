"""A percentile of some requests over that of others, and how sure it is when both came in rounds.

Requests of a round share a queue, so a hundred late ones may be one hiccup: what varies independently is a
round, and rounds are what is drawn anew (a cluster bootstrap).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_DRAWS: Final = 500
_INTERVAL: Final = (2.5, 97.5)

Seconds = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of the percentiles of all rounds together, with a 95 % interval over rounds; and every round's own."""

    value: float
    low: float
    high: float
    by_round: tuple[float, ...]

    @property
    def median_round(self) -> float:
        """One bad round does not move it."""
        return float(np.median(self.by_round))

    @classmethod
    def of(
        cls, these: Sequence[Seconds], those: Sequence[Seconds], percentile: float = 99.0, seed: int = 0
    ) -> Ratio:
        """`these` and `those`: what requests took, an array per round, the same rounds in both. NaN, an
        answer that never came, does not count here. Raises `ValueError` where a round has none of one."""
        these, those = ([_known(part) for part in parts] for parts in (these, those))
        rounds = len(these)
        if rounds != len(those) or not rounds or not all(map(len, (*these, *those))):
            raise ValueError("every round needs requests of both kinds")
        rng = np.random.default_rng(seed)
        drawn = [
            _ratio([these[i] for i in places], [those[i] for i in places], percentile)
            for places in rng.integers(0, rounds, (_DRAWS, rounds))
        ]
        own = [_ratio([one], [other], percentile) for one, other in zip(these, those, strict=True)]
        low, high = np.percentile(drawn, _INTERVAL)
        return cls(
            value=round(_ratio(these, those, percentile), 3),
            low=round(float(low), 3),
            high=round(float(high), 3),
            by_round=tuple(round(figure, 3) for figure in own),
        )


def _ratio(these: Sequence[Seconds], those: Sequence[Seconds], percentile: float) -> float:
    one, other = (np.percentile(np.concatenate(parts), percentile) for parts in (these, those))
    return float(one / other)


def _known(took_s: Seconds) -> Seconds:
    return np.asarray(took_s[~np.isnan(took_s)])
