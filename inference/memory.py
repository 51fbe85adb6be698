"""Large arrays that the system gives and gets back page by page, and what the allocator keeps of the rest."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import sys
import weakref
from collections import deque
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
# Of what `lasting` made and nobody refers to any more, the last. Without a lock: who collects garbage may
# come here in the midst of anything.
_left: deque[mmap.mmap] = deque(maxlen=1)


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
    return np.frombuffer(_mapping(size, large_pages=large_pages), kind).reshape(shape)


def lasting(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """As `zeros` with large pages, but with the last reference the mapping is kept for whoever asks next, one
    mapping in a process: who gets it finds its pages there, and in them the numbers of whoever had it before.
    Another size is made anew, and what was kept is the system's again."""
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    if not size:
        return np.zeros(shape, kind)
    mapping: mmap.mmap | None = None
    with contextlib.suppress(IndexError):
        mapping = _left.pop()
    if mapping is None or len(mapping) != size:
        mapping = _mapping(size, large_pages=True)
    # Whatever is cut out of this array refers to it.
    whole = np.frombuffer(mapping, kind)
    weakref.finalize(whole, _left.append, mapping).atexit = False
    return whole.reshape(shape)


def _mapping(size: int, *, large_pages: bool) -> mmap.mmap:
    mapping = mmap.mmap(-1, size, **_OWN)
    if large_pages and _HUGEPAGE is not None:
        with contextlib.suppress(OSError):
            mapping.madvise(_HUGEPAGE)
    return mapping


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
