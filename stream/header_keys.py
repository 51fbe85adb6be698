"""Header keys that are no UTF-8.

Kafka calls a header's key a string; a producer in C or Go may send any bytes. aiokafka raises
`UnicodeDecodeError` out of `getmany` then, before anyone has an offset to skip, and does so again
after every restart: one such record would stop its partition for good. `tolerate` has aiokafka read a
batch that holds one in Python, with the bytes escaped (`\\xff`), and all others as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aiokafka.consumer import fetcher
from aiokafka.record import memory_records
from aiokafka.record.default_records import _DefaultRecordBatchPy

_STRICT: Any = memory_records.MemoryRecords


def tolerate() -> None:
    """For every consumer of this process."""
    fetcher.MemoryRecords = _Records


class _Records:
    """What the fetcher reads a response with. The strict reader's batches, made tolerant."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._strict = _STRICT(data)
        self._at = 0

    def size_in_bytes(self) -> int:
        return int(self._strict.size_in_bytes())

    def has_next(self) -> bool:
        return bool(self._strict.has_next())

    def next_batch(self) -> Any:
        batch = self._strict.next_batch()
        start = self._at
        length = int.from_bytes(self._data[start + 8 : start + 12], "big")
        self._at = start + 12 + length
        if batch is None or self._data[start + 16] < 2:
            return batch
        return _Batch(batch, self._data, start, self._at)


class _Batch:
    """A record batch that is read strictly until that fails."""

    def __init__(self, strict: Any, data: bytes, start: int, end: int) -> None:
        self._strict = strict
        self._data = data
        self._start = start
        self._end = end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strict, name)

    def __iter__(self) -> Iterator[Any]:
        read = 0
        try:
            for record in self._strict:
                yield record
                read += 1
        except UnicodeDecodeError:
            tolerant = _DefaultRecordBatchPy(self._data[self._start : self._end])
            tolerant._maybe_uncompress()
            tolerant._buffer = _Buffer(tolerant._buffer)
            for number, record in enumerate(tolerant):
                if number >= read:
                    yield record


class _Buffer(bytearray):
    def __getitem__(self, at: Any) -> Any:
        part = super().__getitem__(at)
        return _Part(part) if isinstance(at, slice) else part


class _Part(bytearray):
    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return super().decode(encoding, "backslashreplace")
