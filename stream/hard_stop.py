"""The end of a worker that cannot end by itself.

A broker that is gone can hold threads of client libraries for ever, and no cancellation reaches
those. What is left behind then is read again by the next owner of the partitions.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

EXIT_CODE = os.EX_TEMPFAIL
_LOG_S = 1.0


class HardStop:
    """Once armed, ends the process with `EXIT_CODE` after `after_s`, unless it has ended before.

    `left` says what is left behind; it is called from another thread.
    """

    def __init__(
        self, after_s: float, left: Callable[[], str], leave: Callable[[int], object] = os._exit
    ) -> None:
        self._after_s = after_s
        self._left = left
        self._leave = leave
        self._timer: threading.Timer | None = None

    def arm(self) -> None:
        """Start the clock; arming again changes nothing."""
        if self._timer is None:
            self._timer = threading.Timer(self._after_s, self._end)
            self._timer.daemon = True
            self._timer.start()

    def _end(self) -> None:
        # Logging may hang on a pipe that nobody reads; the end may not.
        logging_ = threading.Thread(target=self._tell, daemon=True)
        logging_.start()
        logging_.join(_LOG_S)
        self._leave(EXIT_CODE)

    def _tell(self) -> None:
        threads = sorted(thread.name for thread in threading.enumerate() if not thread.daemon)
        log.critical(
            "Not stopped after %.0f s, ending hard with %s; threads: %s",
            self._after_s,
            self._left(),
            ", ".join(threads),
        )
