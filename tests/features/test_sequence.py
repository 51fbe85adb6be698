from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from features.sequence import NARROW, WIDE, pack, pack_event, pack_fence, unpack
from features.settings import FeatureSettings

FENCES = pack_fence(1, 0, 9) + pack_fence(1, 3, 2**53)


def packed(items: range, *, wide: bool = False) -> bytes:
    shift = 2**40 if wide else 0
    body = b"".join(pack_event(item + shift, 5, item & 3, 1000 + item) for item in items)
    return bytes((WIDE if wide else NARROW, 2)) + FENCES + body


def test_columns_of_several_users_follow_one_another() -> None:
    batch = unpack([packed(range(3)), None, packed(range(7, 9)), b""])
    assert batch.lengths.tolist() == [3, 0, 2, 0]
    assert batch.items.tolist() == [0, 1, 2, 7, 8]
    assert batch.behaviors.tolist() == [0, 1, 2, 3, 0]
    assert batch.timestamps.tolist() == [1000, 1001, 1002, 1007, 1008]
    assert set(batch.categories.tolist()) == {5}


@pytest.mark.parametrize("wide", [False, True])
def test_last_keeps_the_newest(wide: bool) -> None:
    batch = unpack([packed(range(60), wide=wide), packed(range(2))], last=4)
    shift = 2**40 if wide else 0
    assert batch.lengths.tolist() == [4, 2]
    assert batch.items.tolist() == [56 + shift, 57 + shift, 58 + shift, 59 + shift, 0, 1]


def test_narrow_and_wide_sequences_share_a_batch() -> None:
    batch = unpack([packed(range(2)), packed(range(2), wide=True), None, packed(range(5, 6))])
    assert batch.lengths.tolist() == [2, 2, 0, 1]
    assert batch.items.tolist() == [0, 1, 2**40, 2**40 + 1, 5]
    assert batch.behaviors.tolist() == [0, 1, 0, 1, 1]


@pytest.mark.parametrize("foreign", [b"\x01", b"\x03\x00", b"\x01\x09short", packed(range(3))[:-1]])
def test_bytes_that_are_no_sequence_are_an_empty_one(foreign: bytes) -> None:
    assert unpack([foreign, packed(range(1))]).lengths.tolist() == [0, 1]


def test_no_users_are_an_empty_batch() -> None:
    assert len(unpack([])) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SEQUENCE_EVENTS", "101"),
        ("STORE_TIMEOUT_MS", "0"),
        ("SEEN_FILTER", "some"),
        ("BEHAVIOR_WEIGHTS", "[1, 3, 0, 5]"),
    ],
)
def test_settings_that_make_no_sense_stop_the_start(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"FEATURES_{name}", value)
    with pytest.raises(ValidationError):
        FeatureSettings()


@pytest.mark.parametrize("large", [False, True])
def test_a_packed_sequence_unpacks_to_its_columns(large: bool) -> None:
    items = np.array([3, 2**62 if large else 2**32 - 1, 5])
    columns = (items, np.array([1, 2**30 - 1, 3]), np.array([0, 3, 1]), np.array([10, 20, 2**32 - 1]))
    value = pack(*columns)
    assert value[0] == (WIDE if large else NARROW)
    batch = unpack([value])
    for column, back in zip(
        columns, (batch.items, batch.categories, batch.behaviors, batch.timestamps), strict=True
    ):
        assert back.tolist() == column.tolist()


def test_a_packed_sequence_of_nothing_is_empty() -> None:
    nothing = np.empty(0, np.int64)
    assert unpack([pack(nothing, nothing, nothing, nothing)]).lengths.tolist() == [0]
