"""Large arrays that the system gives and gets back page by page, and what the allocator keeps of the rest."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import sys
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_HUGEPAGE: Final[int | None] = getattr(mmap, "MADV_HUGEPAGE", None)
_POPULATE_WRITE: Final = 23  # Linux 5.14; the mmap module does not name it
# Of glibc's mallopt.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_MAX: Final = -4
_MOST_INT: Final = 2**31 - 1
# Pages of this process alone, written or not.
_OWN: Final = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike, *, large_pages: bool = False) -> npt.NDArray[Any]:
    """As numpy's, in a mapping of its own: a page takes memory once it is written, and all of them are the
    system's again with the last reference. The allocator, once it has freed something as large, gives used
    memory that it fills with zeros under the interpreter's lock, and keeps it when it is freed.

    `large_pages`: where the system has such, a fault and a page to free for every 2 MiB, not for every 4 KiB;
    for what is written close together."""
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    if not size:
        return np.zeros(shape, kind)
    mapping = mmap.mmap(-1, size, **_OWN)
    if large_pages and _HUGEPAGE is not None:
        with contextlib.suppress(OSError):
            mapping.madvise(_HUGEPAGE)
    return np.frombuffer(mapping, kind).reshape(shape)


def populate(array: npt.NDArray[Any]) -> None:
    """Have the system's pages for a part of what `zeros` made, so that who writes there first need not wait.
    Other threads go on meanwhile. What is there stays as it is. Does nothing where the system cannot."""
    if array.nbytes:
        first = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
        size = array.ctypes.data + array.nbytes - first
        _function("madvise")(ctypes.c_void_p(first), ctypes.c_size_t(size), _POPULATE_WRITE)


def give_back() -> None:
    """What a freed model leaves in the allocator goes back, in a few milliseconds during which other
    threads go on. Does nothing where the C library is not glibc."""
    _function("malloc_trim")(0)


def keep_freed() -> None:
    """What is freed stays with the allocator from now on: for a process that works on one large file after
    the other, and else has the system make and take back the same pages each time. Does nothing where the C
    library is not glibc."""
    mallopt = _function("mallopt")
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _MOST_INT)


@functools.cache
def _function(name: str) -> Callable[..., object]:
    try:
        found: Callable[..., object] = getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return lambda *_: None
    return found
