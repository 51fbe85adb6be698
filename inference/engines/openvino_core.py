"""OpenVINO's core: one for the whole process, kept to its end.

The CPU plugin gives the thread that loads it an alternate signal stack, for the large registers of some
processors, and unmaps that when the plugin goes, whichever thread lets go of it. The next signal on the
first thread, SIGTERM say, would then end the process (seen in OpenVINO 2026.4).
"""

from __future__ import annotations

import threading
from typing import Any

import openvino as ov

_making = threading.Lock()
_core: list[Any] = []


def core() -> Any:
    with _making:
        if not _core:
            _core.append(ov.Core())
        return _core[0]
