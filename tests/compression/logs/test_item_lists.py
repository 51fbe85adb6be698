"""Benchmark files of users and items, read as sequences."""

import gzip

import numpy as np
import pytest

from compression.logs.dataset import read_log
from compression.logs.item_lists import ItemListReader, is_item_lists
from compression.logs.log_reader import LogInvalid

PAIRS = "1 10\n1 11\n2 10\n1 12\n"
LISTS = "1 10 11 12\n2 10\n"


@pytest.mark.parametrize("text", [PAIRS, LISTS], ids=["a line per event", "a line per user"])
@pytest.mark.parametrize(
    "pack", [str.encode, lambda text: gzip.compress(text.encode())], ids=["plain", "gzip"]
)
def test_both_forms_give_the_same_sequences_in_their_order(tmp_path, text, pack):
    path = tmp_path / "items.txt"
    path.write_bytes(pack(text))
    sequences = read_log(path).sequences
    assert sequences.users.tolist() == [1, 2]
    assert np.split(sequences.items, sequences.offsets[1:-1])[0].tolist() == [10, 11, 12]
    assert len(sequences) == 4


def test_a_log_is_not_taken_for_item_lists(tmp_path):
    for text in ("1,2,3,pv,1511544070\n", "", "user item\n1 2\n", "7\n"):
        (tmp_path / "log").write_text(text)
        assert not is_item_lists(tmp_path / "log")
    assert not is_item_lists(tmp_path / "absent")
    assert not is_item_lists(tmp_path)


def test_bad_lines_are_counted_with_their_numbers_and_the_rest_is_read(tmp_path):
    path = tmp_path / "items.txt"
    path.write_text(f"1 10\nx 11\n\n1\n2 {2**63}\n2 12\n")
    reader = ItemListReader(path)
    assert [chunk.items.tolist() for chunk in reader.chunks()] == [[10, 12]]
    assert [(bad.line, bad.reason) for bad in reader.report.bad] == [
        (2, "not-a-list"),
        (4, "not-a-list"),
        (5, "id-range"),
    ]


def test_a_file_cut_short_gives_what_came_before_the_cut(tmp_path):
    path = tmp_path / "items.txt.gz"
    rng = np.random.default_rng(1)
    whole = "".join(f"{user} {item}\n" for user, item in rng.integers(0, 10**9, (20_000, 2)))
    packed = gzip.compress(whole.encode())
    path.write_bytes(packed[: len(packed) // 2])
    log = read_log(path)
    assert 5_000 < len(log.sequences) < 15_000
    assert "cut" in log.report.truncated or "damaged" in log.report.truncated


def test_a_file_of_nothing_but_bad_lines_is_refused(tmp_path):
    path = tmp_path / "items.txt"
    path.write_text("1\n")
    with pytest.raises(LogInvalid, match="no line of a user"):
        list(ItemListReader(path).chunks())
