"""Numbers too small to be normal are zeros while a network trains: they cost a processor a hundred times a
product, and say nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def flushed() -> Iterator[None]:
    """In this thread and those that torch starts for it, and no longer: others count on IEEE arithmetic."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
