"""What one list is, in every arm: a full history, and so many candidates."""

from __future__ import annotations

from typing import Final

HISTORY: Final = 100
CANDIDATES: Final = 50
COLUMNS: Final = ("items", "categories", "behaviors", "gaps")
ROW: Final = len(COLUMNS) * HISTORY + 1 + 2 * CANDIDATES
"""int32 in one row of a body: the columns, the length, the candidates, their categories."""
MAX_LISTS: Final = 32
"""In one batch, of every arm."""
