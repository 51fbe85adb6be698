"""Where a full history starts, so that it mostly starts there after the next click, too.

A window of the newest 100 events slides with every click: its oldest event leaves, and whatever was computed
of the others in order is worth nothing. So a full window is shown to a network from an event on that its
content names: of the oldest few the one with the lowest hash (minima of a sliding window, as in Broder's
min-hashing and winnowing: Schleimer, Wilkerson, Aiken, "Winnowing: local algorithms for document
fingerprinting", SIGMOD 2003). It stays the lowest until it leaves, or until a lower one comes in reach: of
n + 1 events that may be it, after one click in (n + 1) / 2 it is another. That follows from the events alone:
whoever is asked, and however often, sees the same start.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from features.sequence import SequenceBatch

# Odd numbers with bits all over, to spread ids and seconds that follow one another.
_ITEM: Final = np.uint64(0x9E3779B97F4A7C15)
_TIMESTAMP: Final = np.uint64(0xC2B2AE3D27D4EB4F)
_SHIFT: Final = np.uint64(29)

Int64 = npt.NDArray[np.int64]


def anchors(histories: SequenceBatch, longest: int, hop: int) -> Int64:
    """How many of the oldest events each user's window leaves out, [users]: 0 to `hop` where the history
    has `longest` events or more, else 0. `hop` is below `longest`."""
    places = np.zeros(len(histories), np.int64)
    full = (histories.lengths >= longest).nonzero()[0]
    if not hop or not len(full):
        return places
    starts = np.cumsum(histories.lengths)[full] - longest
    at = starts[:, None] + np.arange(hop + 1)
    hashes = histories.items[at].astype(np.uint64) * _ITEM
    hashes ^= hashes >> _SHIFT
    hashes += histories.timestamps[at].astype(np.uint64)
    hashes *= _TIMESTAMP
    hashes ^= hashes >> _SHIFT
    places[full] = hashes.argmin(axis=1) + histories.lengths[full] - longest
    return places


def from_anchors(histories: SequenceBatch, longest: int, hop: int) -> SequenceBatch:
    """The same from there on; the very batch where nobody's starts later."""
    left_out = anchors(histories, longest, hop)
    if not left_out.any():
        return histories
    return histories.newest(histories.lengths - left_out)
