"""A command that is told to end tidies up after itself, as it does on Ctrl-C."""

from __future__ import annotations

import signal
import sys
from types import FrameType


def tidy_on_sigterm() -> None:
    """On the first SIGTERM leave by every `finally`, so that servers that were started stop; the second
    ends the process at once. Where somebody else handles SIGTERM nothing changes."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    sys.exit(128 + number)
