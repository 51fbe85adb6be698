"""Benchmark files that hold nothing but who took what in which order.

Two forms are common: a line per event, `user item` (MovieLens-1M as SASRec prepared it), and a line per
user, `user item item …` (Amazon as S3Rec prepared it). The order of lines, and of items on a line, is
the order of events. There is no clock, so all events have the same time, category 0 and behaviour "pv".
"""

from __future__ import annotations

import gzip
import re
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import numpy as np

from compression.log_reader import KEEP_BAD, BadRow, EventChunk, LogInvalid, ReadReport
from topics.messages import MAX_ID

CHUNK_EVENTS: Final = 500_000
MAX_LINE_BYTES: Final = 2**20
_TIME_S: Final = 1
_LINE: Final = re.compile(rb"\s*[0-9]{1,19}(?:[ \t]+[0-9]{1,19})+\s*")


def is_item_lists(path: str | Path) -> bool:
    """Whether the first line that is not blank is whole numbers with nothing but blanks between them."""
    try:
        with Path(path).open("rb") as raw, _inflated(raw) as file:
            while line := file.readline(MAX_LINE_BYTES):
                if line.strip():
                    return bool(_LINE.fullmatch(line))
    except (OSError, EOFError, zlib.error):
        pass
    return False


class ItemListReader:
    """One pass over one file; what `LogReader` is for logs."""

    def __init__(self, path: str | Path, *, keep_bad: int = KEEP_BAD) -> None:
        self.path = Path(path)
        self.report = ReadReport()
        self.fraction = 0.0
        self._keep_bad = keep_bad

    def chunks(self) -> Iterator[EventChunk]:
        """The events in file order. `LogInvalid` when there is none."""
        users, items, lines = array("q"), array("q"), array("q")
        for number, values in self._rows():
            count = len(values) - 1
            users.extend(values[:1] * count)
            items.extend(values[1:])
            lines.extend([number] * count)
            if len(items) >= CHUNK_EVENTS:
                yield self._chunk(users, items, lines)
                users, items, lines = array("q"), array("q"), array("q")
        if items:
            yield self._chunk(users, items, lines)
        if not self.report.rows:
            raise LogInvalid(f"{self.path} holds no line of a user and at least one item")

    def _rows(self) -> Iterator[tuple[int, list[int]]]:
        size = max(1, self.path.stat().st_size)
        with self.path.open("rb") as raw, _inflated(raw) as file:
            try:
                for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
                    self.fraction = raw.tell() / size
                    if _LINE.fullmatch(line):
                        values = [int(value) for value in line.split()]
                        if max(values) <= MAX_ID:
                            yield number, values
                        else:
                            self._bad(number, "id-range", f"an id of {max(values)} is not in 0..2^63-1")
                    elif line.strip():
                        self._bad(number, "not-a-list", "not a user and items with blanks between them")
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                self.report.truncated = f"the gzip file is damaged ({error}); rows up to there were read"

    def _chunk(self, users: array[int], items: array[int], lines: array[int]) -> EventChunk:
        self.report.rows += len(items)
        same = np.zeros(len(items), np.int64)
        return EventChunk(
            users=np.array(users, np.int64),
            items=np.array(items, np.int64),
            categories=same,
            behaviors=same,
            timestamps=same + _TIME_S,
            lines=np.array(lines, np.int64),
        )

    def _bad(self, line: int, reason: str, detail: str) -> None:
        self.report.bad_rows += 1
        self.report.reasons[reason] = self.report.reasons.get(reason, 0) + 1
        if len(self.report.bad) < self._keep_bad:
            self.report.bad.append(BadRow(line, reason, detail))


def _inflated(file: IO[bytes]) -> IO[bytes]:
    """Plain bytes, whatever the file's name: gzip is told by its first two bytes."""
    head = file.read(2)
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if head == b"\x1f\x8b" else file  # type: ignore[return-value]
