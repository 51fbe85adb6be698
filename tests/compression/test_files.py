"""Files that somebody else may have put there, read and hashed alike."""

from __future__ import annotations

import hashlib
import os

import pytest

from compression.errors import ArtefactInvalid
from compression.files import hash_plain, read_plain

DATA = os.urandom(300_000)  # several pieces, the last one not full


@pytest.mark.parametrize("limit", [300_000, 299_999, 131_072, 131_071, 0])
def test_what_is_hashed_is_what_would_be_read(tmp_path, limit):
    (tmp_path / "file").write_bytes(DATA)
    data = read_plain(tmp_path / "file", limit, "v1")
    assert data == DATA[: limit + 1]
    assert hash_plain(tmp_path / "file", limit, "v1") == (hashlib.sha256(data).hexdigest(), len(data))


@pytest.mark.parametrize("read", [read_plain, hash_plain])
def test_a_link_is_not_followed(tmp_path, read):
    (tmp_path / "file").write_bytes(DATA)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(ArtefactInvalid, match="v1: link cannot be read"):
        read(tmp_path / "link", 300_000, "v1")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtefactInvalid, match="v1: pipe is not a plain file"):
        read(tmp_path / "pipe", 300_000, "v1")
