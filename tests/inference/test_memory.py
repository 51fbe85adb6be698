"""Arrays in mappings of their own, and who waits for their pages."""

from __future__ import annotations

import mmap
import resource
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compression.releases.registry import ModelShape
from inference import memory
from inference.user_cache import UserCache

TOLD = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LARGE_PAGES = TOLD.read_text() if TOLD.exists() else "[never]"
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or "[always]" in LARGE_PAGES, reason="faults are counted by small pages"
)

MIB = 2**20


def faults(work: Callable[[], object]) -> int:
    """How often this process waited for a page."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.fixture
def small_pages(monkeypatch):
    monkeypatch.setattr(memory, "_HUGEPAGE", None)


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch):
    monkeypatch.setattr(memory, "_left", deque(maxlen=1))


def test_who_writes_first_waits_for_pages_unless_they_are_there(small_pages):
    waited, ready = (memory.zeros((8 * MIB,), np.uint8) for _ in range(2))
    memory.populate(ready)
    assert faults(lambda: ready.fill(1)) < 100
    assert faults(lambda: waited.fill(1)) > 1_000


def test_who_asks_has_large_pages_where_the_system_has_them():
    if "[never]" in LARGE_PAGES:
        pytest.skip("it has none")
    small, large = memory.zeros((16 * MIB,), np.uint8), memory.zeros((16 * MIB,), np.uint8, large_pages=True)
    assert faults(lambda: large.fill(1)) < 1_000 < faults(lambda: small.fill(1))


def test_what_was_written_stays():
    array = memory.zeros((MIB,), np.uint8)
    array[1_000:9_000] = 7
    memory.populate(array[500:20_000])
    assert (array[1_000:9_000] == 7).all() and array.sum() == 7 * 8_000
    memory.populate(array[:0])


def test_who_asks_for_as_much_as_was_left_last_finds_its_pages(small_pages):
    first = memory.lasting((8, MIB), np.uint8)
    first.fill(7)
    part = first[3]
    del first
    # Somebody still reads it.
    other = memory.lasting((2 * MIB,), np.float32)
    assert faults(lambda: other.fill(1)) > 1_000 and (part == 7).all()
    del part
    again = memory.lasting((2 * MIB,), np.float32)
    assert faults(lambda: again.fill(1)) < 100


def test_of_what_is_left_one_mapping_is_kept_and_another_size_is_made_anew(small_pages):
    one, other = (memory.lasting((8 * MIB,), np.uint8) for _ in range(2))
    one.fill(1)
    other.fill(2)
    del one, other
    assert len(memory._left) == 1
    smaller = memory.lasting((4 * MIB,), np.uint8)
    assert not smaller.any() and not memory._left


def test_a_cache_has_the_pages_of_the_one_that_was_freed_last(small_pages):
    shape = ModelShape(dim=64, layers=2, heads=1, ffn=64, max_history=100, item_rows=10, category_rows=4)

    def room(cache: UserCache) -> int:
        return faults(lambda: list(cache.make_room(64)))

    before = UserCache(shape, 64, retrieved=10, listed=10)
    assert room(before) > 1_000
    before._states.fill(1)
    beside = UserCache(shape, 64, retrieved=10, listed=10)
    assert room(beside) > 1_000 and not beside._states.any()
    del before
    assert room(UserCache(shape, 64, retrieved=10, listed=10)) < 100


def test_a_cache_has_room_for_as_many_users_as_are_expected(small_pages):
    shape = ModelShape(dim=64, layers=2, heads=1, ffn=64, max_history=100, item_rows=10, category_rows=4)
    cache = UserCache(shape, 64, retrieved=10, listed=10)
    steps = sum(1 for _ in cache.make_room(40))
    assert 1 < steps < 40
    assert faults(lambda: cache._states[:40].fill(1)) < 100 < faults(lambda: cache._states[40:].fill(1))
    assert sum(1 for _ in cache.make_room(10_000)) < 64
    assert not list(cache.make_room(0))


def test_who_keeps_what_was_freed_waits_for_its_pages_once():
    lines = (
        "import resource, sys",
        "from inference import memory",
        "if sys.argv[1] == 'kept': memory.keep_freed()",
        "for _ in range(4): bytes(bytearray(20 * 2**20))",
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)",
    )

    def faults_where(freed: str) -> int:
        told = subprocess.run(
            [sys.executable, "-c", "\n".join(lines), freed], capture_output=True, text=True, check=True
        )
        return int(told.stdout)

    pages = 20 * MIB // mmap.PAGESIZE
    # Two buffers at a time: of eight, two find no pages.
    assert faults_where("returned") - faults_where("kept") > 5 * pages
