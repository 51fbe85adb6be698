"""Large arrays that the system gives and gets back page by page, and what the allocator keeps of the rest."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import sys
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

# Pages of this process alone, written or not.
_OWN: Final = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """As numpy's, in a mapping of its own: a page takes memory once it is written, and all of them are the
    system's again with the last reference. The allocator, once it has freed something as large, gives used
    memory that it fills with zeros under the interpreter's lock, and keeps it when it is freed."""
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    if not size:
        return np.zeros(shape, kind)
    return np.frombuffer(mmap.mmap(-1, size, **_OWN), kind).reshape(shape)


def give_back() -> None:
    """What a freed model leaves in the allocator goes back, in a few milliseconds during which other
    threads go on. Does nothing where the C library is not glibc."""
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], object]:
    try:
        trim: Callable[[int], object] = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return lambda _: None
    return trim
