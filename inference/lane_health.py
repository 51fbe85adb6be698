"""Which lanes are well: one that fails or hangs is taken out, asked again after a pause, and comes back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from inference import metrics
from inference.dispatcher import SLOW, Lane

logger = logging.getLogger(__name__)

# A lane that has become slow, and is not asked for it, is probed this often.
_PROBE_EVERY_S: Final = 1.0


class LaneHealth:
    """Used from one event loop. `replace` is called with a lane that was taken out: it may give the lane a
    new engine, in a thread of its own, before the lane is probed. `changed` is called when a lane can be
    given work again."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        *,
        hang_s: float,
        changed: Callable[[], None],
        replace: Callable[[Lane], None] | None = None,
    ) -> None:
        self._lanes = lanes
        self._hang_s = hang_s
        self._changed = changed
        self._replace = replace
        self._probes: set[asyncio.Future[None]] = set()
        self._pauses: set[asyncio.TimerHandle] = set()
        self._closing = False

    @property
    def is_asking(self) -> bool:
        """Whether a probe runs."""
        return bool(self._probes)

    def close(self) -> None:
        """Ask nobody any more."""
        self._closing = True
        for handle in self._pauses:
            handle.cancel()

    def failed(self, lane: Lane, what: str, *, hung: bool = False) -> None:
        """A lane failed, or hung: once too often, and it is taken out."""
        metrics.LANE_FAILURES.labels(lane.name).inc()
        if not lane.failed(hung=hung):
            return
        logger.warning("Lane %s %s and is taken out for %.2f s", lane.name, what, lane.pause_s)
        metrics.LANE_UP.labels(lane.name).set(0)
        if self._replace is not None:
            self._replace(lane)
        self._pause(lane)

    def refresh_slow(self) -> None:
        """Ask lanes that became slow, and that nobody asks any more, whether they still are."""
        now_s = asyncio.get_running_loop().time()
        for lane in self._lanes:
            if lane.probe is None or lane.busy or lane.out or lane.profile.scale < SLOW:
                continue
            if now_s - lane.probed_s >= _PROBE_EVERY_S and not self._closing:
                self._ask(lane)

    def _pause(self, lane: Lane) -> None:
        """Leave a lane alone for a while, then ask it whether it is well."""

        def over() -> None:
            self._pauses.discard(handle)
            if self._closing:
                return
            if lane.probe is None:
                lane.out = False  # the next live batch tells
                self._changed()
            else:
                self._ask(lane)

        handle = asyncio.get_running_loop().call_later(lane.pause_s, over)
        self._pauses.add(handle)

    def _ask(self, lane: Lane) -> None:
        loop = asyncio.get_running_loop()
        asked_s = lane.probed_s = loop.time()
        asking = loop.run_in_executor(lane.executor, lane.probe or (lambda: None))
        self._probes.add(asking)

        def hung() -> None:
            self._probes.discard(asking)
            lane.renew_thread()
            self.failed(lane, "hangs at its probe", hung=True)

        def told(future: asyncio.Future[None]) -> None:
            if future not in self._probes:
                return
            self._probes.discard(future)
            watch.cancel()
            if self._closing or future.cancelled():
                return
            error = future.exception()
            if error is not None:
                self.failed(lane, f"is not well yet ({error})", hung=lane.out)
                return
            if lane.out:
                logger.info("Lane %s is back", lane.name)
                metrics.LANE_UP.labels(lane.name).set(1)
                lane.profile.restart()
            else:
                lane.profile.observe(1, loop.time() - asked_s)
            lane.succeeded()
            self._changed()

        watch = loop.call_later(self._hang_s, hung)
        asking.add_done_callback(told)
