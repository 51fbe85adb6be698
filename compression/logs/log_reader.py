"""Taobao UserBehavior logs, block by block: user_id,item_id,category_id,behavior,Unix seconds.

Lines are parsed a block at a time with numpy; only a line that does not look like the common case is
looked at by itself, and then either understood (quotes, spaces, large ids) or reported with its number
and reason. A bad row never ends the reading, and neither does a gzip file that was cut short.

>>> reader = LogReader(Path("UserBehavior.csv.gz"))
>>> events = sum(len(chunk) for chunk in reader.chunks())
>>> reader.report.bad_rows
0
"""

from __future__ import annotations

import csv
import re
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from topics.codec import MAX_FUTURE_S
from topics.messages import BEHAVIORS, MAX_ID, BehaviorEvent

BLOCK_BYTES: Final = 4 * 2**20
MAX_LINE_BYTES: Final = 64 * 1024
KEEP_BAD: Final = 20

# Unix seconds reach this in the year 2096; a timestamp in milliseconds is past it since 2001-09.
_MILLISECONDS_FROM: Final = 4_000_000_000
_NAMES: Final = ("user_id", "item_id", "category_id", "behavior", "timestamp")
_INTEGER: Final = re.compile(r"-?[0-9]{1,400}")
_CODES: Final = {name: code for code, name in enumerate(BEHAVIORS)}
_COMMA, _NEWLINE, _RETURN, _ZERO = 44, 10, 13, 48
_GZIP: Final = 31  # zlib's name for "with a gzip header and checksum"
_INFLATE_BYTES: Final = 64 * 1024
_BOM: Final = b"\xef\xbb\xbf"
_FAST_DIGITS: Final = 18  # always below 2^63

Int64 = npt.NDArray[np.int64]
_Read = Callable[[int], bytes]
Bytes = npt.NDArray[np.uint8]


class LogInvalid(ValueError):
    """Nothing can be read from the log; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A line that is not an event, its reason (a short stable code) and a sentence for a person."""

    line: int
    reason: str
    detail: str


@dataclass(slots=True)
class ReadReport:
    """What was read so far. `bad` holds the first bad rows; `reasons` counts all of them."""

    rows: int = 0
    bad_rows: int = 0
    bad: list[BadRow] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    truncated: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class EventChunk:
    """Events as int64 columns, in file order. `lines` are the line numbers they stood on;
    `behaviors` are positions in `topics.messages.BEHAVIORS`."""

    users: Int64
    items: Int64
    categories: Int64
    behaviors: Int64
    timestamps: Int64
    lines: Int64

    def __len__(self) -> int:
        return len(self.users)


class LogReader:
    """One pass over one log. `now_s` is the clock that "future" is measured by."""

    max_line_bytes: ClassVar[int] = MAX_LINE_BYTES

    def __init__(
        self,
        path: str | Path,
        *,
        now_s: float | None = None,
        keep_bad: int = KEEP_BAD,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.path = Path(path)
        self.report = ReadReport()
        self._latest_s = min(
            int((time.time() if now_s is None else now_s) + MAX_FUTURE_S), _MILLISECONDS_FROM - 1
        )
        self._keep_bad = keep_bad
        self._block_bytes = block_bytes
        self._size = 0
        self._read = 0

    @property
    def fraction(self) -> float:
        """How much of the file has been read, for a progress bar."""
        return self._read / self._size if self._size else 0.0

    def chunks(self) -> Iterator[EventChunk]:
        """The events in file order. `LogInvalid` when the file cannot be opened or holds no event."""
        for number, block in self._lines():
            chunk = self._parse(block, number)
            if len(chunk):
                self.report.rows += len(chunk)
                yield chunk
        if not self.report.rows:
            raise LogInvalid(self._why_empty())

    def _why_empty(self) -> str:
        advice = "`tailrace synth OUT.csv` writes a log of the right form"
        if self.report.truncated:
            return f"{self.path}: no event could be read: {self.report.truncated}; {advice}"
        if not self.report.bad_rows:
            return f"{self.path} is empty: it needs rows of {','.join(_NAMES)}; {advice}"
        first = self.report.bad[0] if self.report.bad else None
        shown = f", the first at line {first.line}: {first.detail}" if first else ""
        return f"{self.path} holds no event: {self.report.bad_rows} bad rows{shown}; {advice}"

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Blocks of whole lines, each ending in a newline, with the number of their first line."""
        number, rest, skipping = 1, b"", False
        for data in self._blocks():
            block = data
            if skipping:
                end = block.find(b"\n")
                if end < 0:
                    continue
                block, skipping = block[end + 1 :], False
                number += 1
            block = rest + block
            end = block.rfind(b"\n") + 1
            whole, rest = block[:end], block[end:]
            if whole:
                yield number, whole.removeprefix(_BOM) if number == 1 else whole
                number += whole.count(b"\n")
            if len(rest) > self.max_line_bytes:
                self._bad(number, "too-long", f"a line of more than {self.max_line_bytes} bytes")
                rest, skipping = b"", True
        if rest and self.report.truncated:
            self._bad(number, "cut", "the last line was cut where the file ends")
        elif rest:
            yield number, (rest.removeprefix(_BOM) if number == 1 else rest) + b"\n"

    def _blocks(self) -> Iterator[bytes]:
        """Plain bytes, whatever the file's name: gzip is told by its first two bytes."""
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise LogInvalid(f"{self.path} cannot be read: {error.strerror}") from None
        with file:
            self._size = self.path.stat().st_size
            head = file.read(2)
            file.seek(0)
            yield from self._inflated(file.read) if head == b"\x1f\x8b" else self._plain(file.read)

    def _plain(self, read: _Read) -> Iterator[bytes]:
        while data := read(self._block_bytes):
            self._read += len(data)
            yield data

    def _inflated(self, read: _Read) -> Iterator[bytes]:
        """In small steps, so that damage costs the rows of one step and not those of a whole block."""
        ready: list[bytes] = []
        held = 0
        for data in self._inflated_steps(read):
            ready.append(data)
            held += len(data)
            if held >= self._block_bytes:
                yield b"".join(ready)
                ready, held = [], 0
        yield b"".join(ready)

    def _inflated_steps(self, read: _Read) -> Iterator[bytes]:
        inflater = zlib.decompressobj(wbits=_GZIP)
        pending, fresh = b"", True
        try:
            while True:
                if not pending:
                    pending = read(_INFLATE_BYTES)
                    self._read += len(pending)
                    if not pending:
                        break
                if inflater.eof:
                    # Members may follow one another, with zeros between them.
                    pending = pending.lstrip(b"\0")
                    inflater, fresh = zlib.decompressobj(wbits=_GZIP), True
                    continue
                fresh = False
                yield inflater.decompress(pending, _INFLATE_BYTES)
                pending = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
            if not inflater.eof and not fresh:
                self.report.truncated = "the gzip file is cut short; rows up to the cut were read"
        except zlib.error as error:
            self.report.truncated = f"the gzip file is damaged ({error}); rows up to there were read"

    def _parse(self, block: bytes, number: int) -> EventChunk:
        """The events of whole lines, the first of which is line `number`."""
        data = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(data == _NEWLINE)
        starts = np.concatenate([[0], ends[:-1] + 1])
        stops = ends - ((data[ends - 1] == _RETURN) & (ends > starts))
        commas = np.flatnonzero(data == _COMMA)
        before = np.searchsorted(commas, starts)
        usual = np.searchsorted(commas, stops) - before == 4
        columns = np.zeros((5, len(ends)), np.int64)
        rows = np.flatnonzero(usual)
        if len(rows):
            at = commas[before[rows][:, None] + np.arange(4)]
            edges = np.column_stack([starts[rows] - 1, at, stops[rows]])
            good = np.ones(len(rows), np.bool_)
            for column in (0, 1, 2, 4):
                value, plain = _integers(data, edges[:, column] + 1, edges[:, column + 1])
                columns[column, rows] = value
                good &= plain
            code = _behavior_codes(data, edges[:, 3] + 1, edges[:, 4])
            columns[3, rows] = code
            good &= (code >= 0) & (columns[4, rows] > 0) & (columns[4, rows] <= self._latest_s)
            usual[rows] = good
        for row in np.flatnonzero(~usual):
            text, line = block[starts[row] : stops[row]], number + int(row)
            if not text.strip() or (line == 1 and _is_header(text)):
                continue
            try:
                columns[:, row] = _parse_line(text, self._latest_s)
                usual[row] = True
            except _BadLine as error:
                self._bad(line, error.reason, error.detail)
        kept = np.flatnonzero(usual)
        users, items, categories, behaviors, timestamps = columns[:, kept]
        return EventChunk(users, items, categories, behaviors, timestamps, kept + number)

    def _bad(self, line: int, reason: str, detail: str) -> None:
        self.report.bad_rows += 1
        self.report.reasons[reason] = self.report.reasons.get(reason, 0) + 1
        if len(self.report.bad) < self._keep_bad:
            self.report.bad.append(BadRow(line, reason, detail))


def iter_events(log: str | Path | LogReader) -> Iterator[BehaviorEvent]:
    """The events of a log in file order, as messages. An event's id names the file and its line, so
    replaying the same file again sends the same ids."""
    reader = log if isinstance(log, LogReader) else LogReader(log)
    name = reader.path.name[:100]
    for chunk in reader.chunks():
        columns = (chunk.users, chunk.items, chunk.categories, chunk.behaviors, chunk.timestamps, chunk.lines)
        for user, item, category, behavior, timestamp, line in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            # The reader has checked every field, so pydantic does not do it again.
            yield BehaviorEvent.model_construct(
                event_id=f"{name}:{line}",
                user_id=user,
                item_id=item,
                category_id=category,
                behavior=BEHAVIORS[behavior],
                timestamp=timestamp,
            )


def _integers(data: Bytes, starts: Int64, stops: Int64) -> tuple[Int64, npt.NDArray[np.bool_]]:
    """Decimal fields data[start:stop], and whether each is plain digits that surely fit."""
    widths = stops - starts
    plain = (widths >= 1) & (widths <= _FAST_DIGITS)
    value = np.zeros(len(starts), np.int64)
    for offset in range(int(widths.max(where=plain, initial=0))):
        inside = offset < widths
        digit = data[np.minimum(starts + offset, len(data) - 1)] - np.uint8(_ZERO)
        plain &= ~inside | (digit <= 9)
        value = np.where(inside, value * 10 + digit, value)
    return value, plain


def _behavior_codes(data: Bytes, starts: Int64, stops: Int64) -> Int64:
    """The code of each field data[start:stop], -1 where it is no behaviour."""
    codes = np.full(len(starts), -1, np.int64)
    widths = stops - starts
    for code, name in enumerate(BEHAVIORS):
        same = widths == len(name)
        for offset, byte in enumerate(name.encode()):
            same &= data[np.minimum(starts + offset, len(data) - 1)] == byte
        codes[same] = code
    return codes


class _BadLine(ValueError):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def _fields(text: bytes) -> list[str]:
    line = text.decode("utf-8", "replace").replace("\0", "\ufffd").replace("\r", " ")
    return [value.strip() for value in next(csv.reader([line]))]


def _is_header(text: bytes) -> bool:
    """Column names: as many as there should be, and not one of them a value."""
    fields = _fields(text[:MAX_LINE_BYTES])
    named = all(value and not _INTEGER.fullmatch(value) for value in fields)
    return named and len(fields) == len(_NAMES) and fields[3] not in _CODES


def _parse_line(text: bytes, latest_s: int) -> tuple[int, int, int, int, int]:
    """A line that is not the common case: an event all the same, or `_BadLine`."""
    if len(text) > MAX_LINE_BYTES:
        raise _BadLine("too-long", f"a line of {len(text)} bytes")
    fields = _fields(text)
    if len(fields) != len(_NAMES):
        raise _BadLine("fields", f"{len(fields)} fields, not {len(_NAMES)}")
    if fields[3] not in _CODES:
        raise _BadLine("behavior", f"behavior {fields[3][:20]!r} is not known")
    user, item, category = (_parse_id(_NAMES[place], fields[place]) for place in range(3))
    timestamp = _parse_integer("timestamp", fields[4])
    if timestamp >= _MILLISECONDS_FROM:
        raise _BadLine("timestamp-unit", f"timestamp {fields[4][:24]} looks like milliseconds")
    if timestamp <= 0:
        raise _BadLine("timestamp-zero", f"timestamp {fields[4][:24]} is not after 1970")
    if timestamp > latest_s:
        raise _BadLine("timestamp-future", f"timestamp {timestamp} is in the future")
    return user, item, category, _CODES[fields[3]], timestamp


def _parse_id(name: str, value: str) -> int:
    parsed = _parse_integer(name, value)
    if not 0 <= parsed <= MAX_ID:
        raise _BadLine("id-range", f"{name} {value[:24]} is not in 0..2^63-1")
    return parsed


def _parse_integer(name: str, value: str) -> int:
    if not _INTEGER.fullmatch(value):
        raise _BadLine("not-a-number", f"{name} {value[:20]!r} is not a whole number")
    return int(value)
