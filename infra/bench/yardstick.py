"""A fixed piece of work beside what is measured: how fast the machine is at the moment.

A figure that rises through a long run may be our doing or the machine's, which has neighbours. What nothing
of ours changes tells them apart: rows gathered from a table that few caches hold, weighed and sorted, in one
thread.
"""

from __future__ import annotations

import time
from typing import Final

import numpy as np

_ROWS: Final = 2**17  # of 64 floats: 32 MiB
_DIM: Final = 64
_GATHERED: Final = 4_096
_REPEATS: Final = 25


class Yardstick:
    """Makes its table once. Takes some 40 ms a reading, in the thread that calls."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._table = rng.standard_normal((_ROWS, _DIM), np.float32)
        self._weights = rng.standard_normal(_DIM, np.float32)
        self._places = rng.integers(0, _ROWS, (_REPEATS, _GATHERED))

    def read_ms(self) -> float:
        """Milliseconds of the same work each time, the median of its repeats."""
        took_s = []
        for places in self._places:
            began_s = time.perf_counter()
            (self._table[places] * self._weights).sum(axis=1).argsort()
            took_s.append(time.perf_counter() - began_s)
        return 1e3 * float(np.median(took_s))
