"""When requests are due: Poisson arrivals whose rate jumps up in short bursts, the same for every arm."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

# A tenth of the time the rate is three times that of the rest: users come in crowds.
BURST: Final = 3.0
BURST_S: Final = 0.02
CALM_S: Final = 0.18
_CALM: Final = (BURST_S + CALM_S) / (BURST * BURST_S + CALM_S)

Float64 = npt.NDArray[np.float64]


def bursty(rate: float, seconds: float, seed: int) -> Float64:
    """Offsets in seconds, ascending, of about `rate` · `seconds` arrivals.

    Bursts lie where the seed puts them, whatever the rate. The same for the same arguments: two arms at
    one rate get one schedule.
    """
    rng = np.random.default_rng(seed)
    edges, busyness = _bursts(rng, seconds)
    # How many arrivals are due by each edge; between edges they come evenly spread.
    due = np.concatenate([[0.0], np.cumsum(np.diff(edges) * busyness)])
    due *= rate * seconds / due[-1]
    gaps = rng.exponential(1.0, int(due[-1] * 1.5) + 50)
    counts = np.cumsum(gaps)
    counts = counts[counts < due[-1]]
    offsets: Float64 = np.interp(counts, due, edges)
    return offsets


def _bursts(rng: np.random.Generator, seconds: float) -> tuple[Float64, Float64]:
    """Edges [n + 1] of calm and burst in turn, and the rate's factor [n] in each."""
    pairs = int(seconds / (BURST_S + CALM_S) * 3) + 10
    lengths = rng.exponential(1.0, (pairs, 2)) * (CALM_S, BURST_S)
    edges = np.concatenate([[0.0], np.cumsum(lengths)])
    factors = np.tile([_CALM, _CALM * BURST], pairs)
    whole = int(np.searchsorted(edges, seconds))
    return np.append(edges[:whole], seconds), factors[:whole]
