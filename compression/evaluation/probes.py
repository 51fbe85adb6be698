"""What an exported version is asked when its answers are looked at or timed: the same every time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from compression.evaluation.targets import histories_before
from compression.evaluation.verdict import Judged
from compression.logs.dataset import Sequences
from features.encoding import HistoryArrays

USERS: Final = 32
CANDIDATES: Final = 50
_RUNS: Final = 30

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]


def histories_of(candidate: Judged, sequences: Sequences, positions: Int64) -> HistoryArrays:
    """32 users of the log, each before an event to be predicted, repeated where there are fewer; the
    first has no history."""
    if not len(positions):
        positions = np.arange(len(sequences))
    chosen = np.resize(positions, USERS)
    found = histories_before(sequences, candidate.vocabulary, candidate.max_history)(chosen)
    columns: dict[str, Any] = dict(found.tensors())
    for column in columns.values():
        column[0] = 0
    return HistoryArrays(**columns)


def candidates_of(candidate: Judged) -> tuple[Int32, Int32]:
    """Candidates and their categories, int32 [32, 50], the same every time."""
    known = max(1, len(candidate.vocabulary.item_ids))
    rows = 1 + np.random.default_rng(3).integers(0, known, (USERS, CANDIDATES))
    of_row = np.concatenate([[0], candidate.vocabulary.item_categories])
    return rows.astype(np.int32), of_row[np.minimum(rows, len(of_row) - 1)].astype(np.int32)


def times_ms(judged: Sequence[Judged], sequences: Sequences, positions: Int64) -> list[float]:
    """What ranking takes, by version: medians of turns that alternate, so that what else the machine does
    meets all alike."""
    asked = [(one.scorer, histories_of(one, sequences, positions), candidates_of(one)) for one in judged]
    took_ms = np.empty((_RUNS, len(asked)))
    for turn in range(_RUNS):
        for place, (scorer, histories, candidates) in enumerate(asked):
            began_s = time.perf_counter()
            scorer.rank(histories, *candidates)
            took_ms[turn, place] = 1000 * (time.perf_counter() - began_s)
    return [float(median) for median in np.median(took_ms, axis=0)]
