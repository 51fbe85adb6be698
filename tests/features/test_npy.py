"""Arrays from anybody's bytes: as large as the bytes are, or refused before there is room for more."""

from __future__ import annotations

import contextlib
import io
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compression.releases.registry import read_item_table
from features.encoding import Vocabulary, VocabularyInvalid
from features.npy import read_npy, read_npz

HUGE = 2**40


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def claiming(shape, data=b""):
    """An .npy file that says it is so large."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def npz(compression=zipfile.ZIP_STORED, **arrays):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in arrays.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


VOCABULARY = {
    "item_ids": np.array([3, 5]),
    "item_categories": np.array([1, 1], np.int32),
    "category_ids": np.array([7]),
    "buckets": np.array([4, 4]),
}


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.zeros((0, 5), np.int8),
        np.array(7.0),
        np.zeros(3, [("codes", np.int8, (4,)), ("step", np.float32)]),
    ],
)
def test_what_numpy_wrote_comes_back(array):
    again = read_npy(npy(array))
    assert again.dtype == array.dtype
    np.testing.assert_array_equal(again, array)


@pytest.mark.parametrize("shape", [(HUGE,), (2**20, 2**20), (4,), (2**62, 2**62), (-1,), (0,)])
def test_an_array_that_claims_another_size_than_it_has_is_refused(shape):
    with pytest.raises(ValueError, match="claimed"):
        read_npy(claiming(shape, b"12345678"))


def test_objects_are_not_unpickled():
    with pytest.raises(ValueError):
        read_npy(npy(np.array([{"a": 1}], dtype=object)))


@pytest.mark.parametrize("header", [b"{'shape': (2,", b"  x\n y", b"'", b"(" * 5_000, b"-" * 9_000 + b"1"])
def test_a_header_that_is_no_literal_is_refused(header):
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with pytest.raises(ValueError):
        read_npy(content)


@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: claiming((2,))[:-1] + tail))
def test_no_bytes_whatever_raise_anything_but_value_error(content):
    with contextlib.suppress(ValueError):
        read_npy(content)


def test_a_vocabulary_that_is_small_and_unpacks_to_much_is_refused():
    arrays = {name: npy(array) for name, array in VOCABULARY.items()}
    assert Vocabulary.load(npz(**arrays)).item_rows == 7
    bomb = npz(zipfile.ZIP_DEFLATED, **{**arrays, "item_ids": npy(np.zeros(2**23, np.int64))})
    assert len(bomb) < 2**18
    with pytest.raises(VocabularyInvalid, match="compressed"):
        Vocabulary.load(bomb)


def test_a_vocabulary_that_claims_more_than_it_has_is_refused():
    arrays = {name: npy(array) for name, array in VOCABULARY.items()}
    with pytest.raises(VocabularyInvalid, match="claimed"):
        Vocabulary.load(npz(**{**arrays, "item_ids": claiming((HUGE,))}))


def test_a_missing_array_and_an_encrypted_one_are_errors():
    with pytest.raises(KeyError):
        read_npz(npz(a=npy(np.zeros(1))), ["b"])
    content = bytearray(npz(a=npy(np.zeros(1))))
    content[content.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(ValueError, match="encrypted"):
        read_npz(bytes(content), ["a"])


def test_an_item_table_that_claims_a_terabyte_is_refused():
    with pytest.raises(ValueError, match="claimed"):
        read_item_table(claiming((HUGE, 64)))
