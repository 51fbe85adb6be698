from __future__ import annotations

import pytest
from pydantic import ValidationError

from features.sequence import NARROW, WIDE, pack_event, pack_fence, unpack
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
