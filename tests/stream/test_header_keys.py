"""A record whose header key is no UTF-8, written by hand: Python's clients cannot send one."""

from __future__ import annotations

import pytest
from aiokafka.consumer import fetcher
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c_py

from stream import header_keys

STRICT = fetcher.MemoryRecords


@pytest.fixture
def tolerant(monkeypatch):
    monkeypatch.setattr(fetcher, "MemoryRecords", STRICT)
    header_keys.tolerate()
    return fetcher.MemoryRecords


def batch(first: int, *header_keys_: str, compression: int = 0) -> bytes:
    """Three records from `first` on, the one in the middle with a header of these keys."""
    builder = DefaultRecordBatchBuilder(
        2,
        compression,
        is_transactional=0,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=0,
        batch_size=1 << 20,
    )
    for number in range(3):
        headers = [(key, b"h") for key in header_keys_] if number == 1 else [("trace", None)]
        builder.append(number, 1_000 + number, key=b"k", value=b"v%d" % number, headers=headers)
    built = bytearray(builder.build())
    built[:8] = first.to_bytes(8, "big")
    return bytes(built)


def spoilt(built: bytes) -> bytes:
    """The batch with the key `zz` made into bytes that are no UTF-8, and its checksum right again."""
    changed = bytearray(built.replace(b"zz", b"\xff\xfe"))
    assert bytes(changed) != built
    changed[17:21] = calc_crc32c_py(bytes(changed[21:])).to_bytes(4, "big")
    return bytes(changed)


def read(records) -> list[tuple]:
    found = []
    while records.has_next():
        one = records.next_batch()
        assert one.validate_crc()
        found += [(r.offset, r.timestamp, r.key, r.value, list(r.headers)) for r in one]
        assert one.next_offset == found[-1][0] + 1
    return found


def test_the_strict_reader_stops_at_such_a_record():
    with pytest.raises(UnicodeDecodeError):
        read(STRICT(spoilt(batch(5, "zz"))))


def test_such_a_record_is_read_with_its_key_escaped_and_so_are_all_others(tolerant):
    data = batch(2, "plain") + spoilt(batch(5, "plain", "zz")) + batch(8, "plain")
    found = read(tolerant(data))
    assert [offset for offset, *_ in found] == list(range(2, 11))
    assert [value for *_, value, _ in found] == [b"v0", b"v1", b"v2"] * 3
    assert found[4][-1] == [("plain", b"h"), ("\\xff\\xfe", b"h")]
    assert found[3][-1] == found[5][-1] == [("trace", None)]


@pytest.mark.parametrize("compression", [0, 1])
def test_what_is_in_order_is_read_as_before(tolerant, compression):
    data = batch(2, "plain", compression=compression) + batch(5, compression=compression)
    assert read(tolerant(data)) == read(STRICT(data))
    assert tolerant(data).size_in_bytes() == STRICT(data).size_in_bytes()


def test_a_response_cut_off_ends_where_the_strict_reader_ends(tolerant):
    data = batch(2, "plain") + batch(5, "plain")[:40]
    assert read(tolerant(data)) == read(STRICT(data))
