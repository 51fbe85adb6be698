"""What one list is, in every arm: a history of at most a hundred events, and so many candidates."""

from __future__ import annotations

from typing import Final

HISTORY: Final = 100
CANDIDATES: Final = 50
COLUMNS: Final = ("items", "categories", "behaviors", "gaps")
MAX_LISTS: Final = 64
"""In one batch, of every arm."""


def row_ints(slots: int) -> int:
    """int32 in one list of a body: the columns, padded to so many slots, the length, the candidates, their
    categories."""
    return len(COLUMNS) * slots + 1 + 2 * CANDIDATES


ROW: Final = row_ints(HISTORY)
