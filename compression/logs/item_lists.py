"""Benchmark files that hold nothing but who took what in which order.

Two forms are common: a line per event, `user item` (MovieLens-1M as SASRec prepared it), and a line per
user, `user item item …` (Amazon as S3Rec prepared it). The order of lines, and of items on a line, is
the order of events. There is no clock, so all events have the same time, category 0 and behaviour "pv".
"""

from __future__ import annotations

import re
from array import array
from pathlib import Path
from typing import Final

import numpy as np

from compression.logs.log_reader import EventChunk, LogInvalid, LogReader
from topics.messages import MAX_ID

_TIME_S: Final = 1
_LINE: Final = re.compile(rb"\s*[0-9]{1,19}(?:[ \t]+[0-9]{1,19})+\s*")


def is_item_lists(path: str | Path) -> bool:
    """Whether the first line that is not blank is whole numbers with nothing but blanks between them."""
    try:
        for _, block in ItemListReader(path)._lines():
            for line in block.split(b"\n"):
                if line.strip():
                    return bool(_LINE.fullmatch(line))
    except LogInvalid:
        pass
    return False


class ItemListReader(LogReader):
    """One pass over one file of item lists."""

    max_line_bytes = 2**20

    def _parse(self, block: bytes, number: int) -> EventChunk:
        users, items, lines = array("q"), array("q"), array("q")
        for at, line in enumerate(block.split(b"\n"), number):
            if _LINE.fullmatch(line):
                user, *taken = (int(value) for value in line.split())
                highest = max(user, *taken)
                if highest > MAX_ID:
                    self._bad(at, "id-range", f"an id of {highest} is not in 0..2^63-1")
                    continue
                users.extend([user] * len(taken))
                items.extend(taken)
                lines.extend([at] * len(taken))
            elif line.strip():
                self._bad(at, "not-a-list", "not a user and items with blanks between them")
        same = np.zeros(len(items), np.int64)
        return EventChunk(
            users=np.array(users, np.int64),
            items=np.array(items, np.int64),
            categories=same,
            behaviors=same,
            timestamps=same + _TIME_S,
            lines=np.array(lines, np.int64),
        )

    def _why_empty(self) -> str:
        return f"{self.path} holds no line of a user and at least one item"
