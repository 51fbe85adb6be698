"""Sequences to rows: the same in training and serving, in every process."""

import subprocess
import sys

import numpy as np
import pytest

from features.encoding import Vocabulary, VocabularyInvalid, encode_histories, gap_buckets
from features.sequence import SequenceBatch


def vocabulary(**changes):
    fields = {
        "item_ids": np.array([3, 9, 2**62]),
        "item_categories": np.array([1, 2, 2], np.int32),
        "category_ids": np.array([5, 7]),
        "item_buckets": 16,
        "category_buckets": 4,
    }
    return Vocabulary(**(fields | changes))


def batch(*users):
    """Each user is a list of (item, category, behaviour code, timestamp)."""
    columns = np.array([event for user in users for event in user], np.int64).reshape(-1, 4).T
    return SequenceBatch(np.array([len(user) for user in users], np.int64), *columns)


def test_known_ids_have_rows_of_their_own_and_unknown_ids_share_buckets():
    ours = vocabulary()
    assert ours.item_rows_of(np.array([3, 9, 2**62])).tolist() == [1, 2, 3]
    unknown = ours.item_rows_of(np.array([4, 2**63 - 1, 0]))
    assert ((unknown >= 4) & (unknown < ours.item_rows)).all()
    assert ours.category_rows_of(np.array([5, 7])).tolist() == [1, 2]
    hashed = ours.category_rows_of(np.arange(100, 400))
    assert hashed.min() > ours.unknown_category_row and hashed.max() < ours.category_rows


def test_an_unknown_item_has_the_unknown_category():
    ours = vocabulary()
    assert ours.category_rows_of_items(np.array([9, 4])).tolist() == [2, ours.unknown_category_row]


def test_rows_name_their_items_again():
    ours = vocabulary()
    assert ours.items_at(np.array([1, 3])).tolist() == [3, 2**62]
    for row in (0, 4):
        with pytest.raises(IndexError):
            ours.items_at(np.array([row]))


def test_buckets_are_the_same_in_another_process():
    code = (
        "import numpy as np; from features.encoding import Vocabulary; e = np.array([], np.int64);"
        "v = Vocabulary(e, e.astype(np.int32), e, 1000, 50);"
        "print(v.item_rows_of(np.arange(5)).tolist(), v.category_rows_of(np.arange(5)).tolist())"
    )
    # A change of these numbers would give released models other rows for unknown items.
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    empty = np.array([], np.int64)
    here = Vocabulary(empty, empty.astype(np.int32), empty, 1000, 50)
    rows = here.item_rows_of(np.arange(5)).tolist(), here.category_rows_of(np.arange(5)).tolist()
    assert answer.stdout.strip() == f"{rows[0]} {rows[1]}"
    assert len(set(rows[0])) == 5


def test_only_the_newest_events_are_kept_oldest_first():
    user = [(3, 5, 0, 100), (9, 7, 1, 103), (9, 7, 3, 110)]
    arrays = encode_histories(batch([], user, [(3, 5, 2, 50)]), vocabulary(), 2)
    assert arrays.lengths.tolist() == [0, 2, 1]
    assert arrays.items.tolist() == [[0, 0], [2, 2], [1, 0]]
    assert arrays.categories.tolist() == [[0, 0], [2, 2], [1, 0]]
    assert arrays.behaviors.tolist() == [[0, 0], [2, 4], [3, 0]]
    assert arrays.gaps.tolist() == [[0, 0], [0, 4], [0, 0]]
    assert all(array.dtype == np.int32 for array in arrays.tensors().values())


def test_the_gap_before_a_user_is_not_the_gap_from_the_user_before():
    arrays = encode_histories(batch([(3, 5, 0, 10)], [(3, 5, 0, 10**9), (3, 5, 0, 10**9)]), vocabulary(), 4)
    assert arrays.gaps.tolist() == [[0, 0, 0, 0], [0, 1, 0, 0]]


def test_a_longer_history_array_holds_the_same_rows():
    users = [[(3, 5, 0, 10), (9, 7, 0, 20)], [(4, 6, 1, 30)]]
    short, long = (encode_histories(batch(*users), vocabulary(), length) for length in (2, 7))
    for name, array in short.tensors().items():
        wide = long.tensors()[name]
        assert (wide == array).all() if name == "lengths" else (wide[:, :2] == array).all()


def test_an_empty_batch_has_no_rows():
    assert encode_histories(batch(), vocabulary(), 5).items.shape == (0, 5)


def test_gaps_fall_into_powers_of_two():
    gaps = np.array([-5, 0, 1, 2, 3, 6, 7, 2**31, 2**40])
    assert gap_buckets(gaps).tolist() == [1, 1, 2, 2, 3, 3, 4, 31, 31]


def test_a_vocabulary_survives_its_file(tmp_path):
    vocabulary().save(tmp_path / "vocabulary.npz")
    for source in (tmp_path / "vocabulary.npz", (tmp_path / "vocabulary.npz").read_bytes()):
        again = Vocabulary.load(source)
        assert again.item_ids.tolist() == [3, 9, 2**62]
        assert (again.item_rows, again.category_rows) == (20, 7)


def test_what_is_not_a_vocabulary_is_refused(tmp_path):
    path = tmp_path / "vocabulary.npz"
    vocabulary().save(path)
    np.savez(tmp_path / "other.npz", item_ids=np.array([object()]))
    for data in (b"", b"PK\x03\x04 nonsense", path.read_bytes()[:200], (tmp_path / "other.npz").read_bytes()):
        with pytest.raises(VocabularyInvalid):
            Vocabulary.load(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"item_ids": np.array([9, 3, 10])},
        {"item_ids": np.array([3, 3, 10])},
        {"item_categories": np.array([1, 2], np.int32)},
        {"item_categories": np.array([1, 2, 99], np.int32)},
        {"item_categories": np.array([0, 2, 1], np.int32)},
        {"category_buckets": 1},
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(changes):
    with pytest.raises(VocabularyInvalid):
        vocabulary(**changes)
