"""Which lanes are well: one that fails or hangs is taken out, asked again after a pause, and comes back; one
that has become much slower than the others gets a new engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from inference import metrics
from inference.dispatcher import SLOW, Lane
from inference.profile import SLOWED

logger = logging.getLogger(__name__)

# A lane that has become slow, and is not asked for it, is probed this often. Where the probe takes less than
# so many times what it took when the engine was warmed, the lane is as fast as ever: so short a batch may
# wait longer for the interpreter's lock than it takes.
_PROBE_EVERY_S: Final = 1.0
_STILL_SLOW: Final = 4.0
# A lane has become slow where the others have not, and was for so long: two short batches that were kept off
# the processor are no reason. Its probe has to say so, too: of a version that has just begun to serve, all
# histories are still to be encoded. A new engine for that comes no more often: it may be the processor.
_ILL_FOR_S: Final = 0.1
_REPLACED_EVERY_S: Final = 60.0


class LaneHealth:
    """Used from one event loop. `replace` is called with a lane that was taken out, or has become slow: it
    may give the lane a new engine, before the lane is probed, and says whether it has. `changed` is called
    when a lane can be given work again."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        *,
        hang_s: float,
        changed: Callable[[], None],
        replace: Callable[[Lane], bool] | None = None,
    ) -> None:
        self._lanes = lanes
        self._hang_s = hang_s
        self._changed = changed
        self._replace = replace
        self._probes: set[asyncio.Future[float]] = set()
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
        """Ask a lane that became slow alone, and those that are not used any more because they were slow,
        whether they still are."""
        now_s = asyncio.get_running_loop().time()
        for lane in self._lanes:
            ill = self._is_ill(lane, now_s)
            if ill and lane.probe is None:
                self._renew(lane)
            if lane.out or lane.profile.scale < SLOW or self._closing or (lane.busy and not ill):
                continue
            if lane.probe is None:
                if now_s - lane.free_at_s >= _PROBE_EVERY_S:
                    lane.profile.restart()  # the next live batch tells
            elif now_s - lane.probed_s >= _PROBE_EVERY_S:
                self._ask(lane)

    def _renew(self, lane: Lane) -> None:
        """Give a lane that is slow a new engine, if there is one."""
        if self._replace is not None and self._replace(lane):
            logger.warning("Lane %s is %.1f times as slow as it was", lane.name, lane.profile.scale)
            lane.replaced_s = asyncio.get_running_loop().time()
            lane.profile.restart()

    def _is_ill(self, lane: Lane, now_s: float) -> bool:
        if lane.out or lane.profile.slow_s < _ILL_FOR_S or now_s - lane.replaced_s < _REPLACED_EVERY_S:
            return False
        others = [other.profile.scale for other in self._lanes if other is not lane and not other.out]
        return bool(others) and lane.profile.scale >= SLOWED and max(others) < SLOW

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
        loop, probe = asyncio.get_running_loop(), lane.probe
        assert probe is not None
        lane.probed_s = loop.time()
        watch: asyncio.TimerHandle | None = None

        def ask() -> float:
            # The time that a probe waits for a batch is the batch's.
            loop.call_soon_threadsafe(begun)
            return probe()

        def begun() -> None:
            nonlocal watch
            if asking in self._probes:
                watch = loop.call_later(self._hang_s, hung)

        def hung() -> None:
            self._probes.discard(asking)
            lane.renew_thread()
            self.failed(lane, "hangs at its probe", hung=True)

        def told(future: asyncio.Future[float]) -> None:
            if future not in self._probes:
                return
            self._probes.discard(future)
            if watch is not None:
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
            if lane.out or future.result() < _STILL_SLOW:
                lane.profile.restart()
            elif self._is_ill(lane, loop.time()):
                self._renew(lane)
            lane.succeeded()
            self._changed()

        asking = loop.run_in_executor(lane.executor, ask)
        self._probes.add(asking)
        asking.add_done_callback(told)
