"""Arrays from bytes that anybody may have written: the size they claim is checked before there is room.

.npy and .npz as numpy writes them, without pickle and without compression: a megabyte stays a megabyte.
"""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_ENCRYPTED: Final = 0x1
_HEADERS: Final = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_npy(content: bytes) -> npt.NDArray[Any]:
    """The array of an .npy file; `ValueError` where the bytes are none, or not as many as it claims."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"an .npy file of version {version} is not read here")
    try:
        shape, _, dtype = _HEADERS[version](file)
    except (SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        # What numpy cannot read it splits into words, as old Pythons wrote it, and that may fail otherwise.
        raise ValueError("the header of an .npy file cannot be read") from error
    claimed, there = math.prod(shape) * dtype.itemsize, len(content) - file.tell()
    if claimed != there:
        raise ValueError(f"an array of {claimed:,} bytes is claimed, and {there:,} are there")
    file.seek(0)
    return np.asarray(np.load(file, allow_pickle=False))


def read_npz(content: bytes, names: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
    """These arrays of an .npz file. `ValueError` or `zipfile.BadZipFile` where it is none or packed,
    `KeyError` where one is missing."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {name: archive.getinfo(f"{name}.npy") for name in names}
        for name, entry in entries.items():
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
                raise ValueError(f"{name} is compressed or encrypted, which no array of ours is")
        return {name: read_npy(archive.read(entry)) for name, entry in entries.items()}
