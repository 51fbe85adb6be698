"""Which lane takes the next batch: the one that is predicted to finish it first.

A lane is an engine and the thread that runs it, here or, through a remote engine, on another machine.
A batch waits for a busy lane when that will still finish it sooner than an idle one would (a GPU that
is about to be free beside an idle CPU), and goes to the slower one as soon as that is no longer so:
work spills over by prediction, not by a rule. Nothing here waits or runs: time is passed in.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from inference.profile import LatencyProfile

# A lane is left alone after so many failed batches in a row, or one that hangs.
_FAILURES: Final = 3
_FIRST_PAUSE_S: Final = 0.25
_LONGEST_PAUSE_S: Final = 10.0
# A batch hangs when it takes so many times what was predicted, and at least `hang_s`.
_HANGS_AT: Final = 10.0
# A lane this much slower than it was when warmed is asked now and then whether it has recovered.
SLOW: Final = 2.0
_NICENESS: Final = 10


def leave_room() -> None:
    """Give this thread a lower priority than the threads that serve, where the system knows threads."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _everything(_: Hashable) -> bool:
    return True


def _thread(name: str) -> Executor:
    return ThreadPoolExecutor(1, thread_name_prefix=f"lane-{name}")


@dataclass(slots=True, eq=False)
class Lane:
    """One engine's way to answers. Kept by the event loop; `run` and `probe` are called in `executor`.

    run(key, items) returns one answer per item. `serves` tells whether the lane has an engine for a
    key (a released version). `probe` runs a known batch of one, raises where the lane is not well and says
    how many times what it took when it was warmed; without one, a live batch is the probe. `hop_s` is what
    the network adds.
    """

    name: str
    run: Callable[[Any, list[Any]], Sequence[Any]]
    serves: Callable[[Any], bool] = _everything
    probe: Callable[[], float] | None = None
    hop_s: float = 0.0
    region: str = "local"
    profile: LatencyProfile = field(default_factory=LatencyProfile)
    new_thread: Callable[[str], Executor] = _thread

    executor: Executor = field(init=False)
    busy: bool = False
    free_at_s: float = 0.0  # when what runs now is predicted to be done
    failures: int = 0
    good_at: int = 0  # the id of the key of the last batch that it answered; 0 before the first
    out: bool = False
    pause_s: float = _FIRST_PAUSE_S
    probed_s: float = 0.0
    replaced_s: float = -math.inf  # when it last had a new engine for being slow

    def __post_init__(self) -> None:
        self.executor = self.new_thread(self.name)

    def renew_thread(self) -> None:
        """Leave a thread that hangs to itself; what waits for it is cancelled."""
        self.executor.shutdown(wait=False, cancel_futures=True)
        self.executor = self.new_thread(self.name)

    def seconds(self, items: int) -> float:
        """Predicted for a batch, the way there and back included."""
        return self.profile.predict(items) + self.hop_s

    def hangs_after_s(self, items: int, hang_s: float) -> float:
        return max(hang_s, _HANGS_AT * self.seconds(items))

    def started(self, items: int, now_s: float) -> None:
        self.busy = True
        self.free_at_s = now_s + self.seconds(items)

    def finished(self, items: int, took_s: float) -> None:
        """A batch that was answered, well or not."""
        self.busy = False
        self.profile.observe(items, max(0.0, took_s - self.hop_s))

    def succeeded(self) -> None:
        self.failures = 0
        self.out = False
        self.pause_s = _FIRST_PAUSE_S

    def failed(self, *, hung: bool = False) -> bool:
        """Whether this takes the lane out: `pause_s` says for how long, each time twice as long."""
        self.failures += 1
        if not (hung or self.failures >= _FAILURES):
            return False
        if self.out:
            self.pause_s = min(2 * self.pause_s, _LONGEST_PAUSE_S)
        self.out = True
        return True


class Choice(NamedTuple):
    """The lane for a batch that is to start now, and how many batches before it wait for another lane."""

    lane: Lane
    place: int


class Dispatcher:
    """Chooses among lanes. Used from one event loop."""

    def __init__(self, lanes: Iterable[Lane]) -> None:
        self.lanes = list(lanes)

    @property
    def running(self) -> bool:
        return any(lane.busy for lane in self.lanes)

    @property
    def has_idle(self) -> bool:
        return any(not lane.busy and not lane.out for lane in self.lanes)

    def fastest_s(self, items: int) -> float:
        """What a batch of so many is predicted to take on the lane that takes least."""
        well = [lane.seconds(items) for lane in self.lanes if not lane.out]
        return min(well, default=float("inf"))

    def able(self, key: Hashable, avoid: Collection[Lane] = ()) -> list[Lane]:
        """The lanes that have an engine for a key and are well."""
        return [lane for lane in self.lanes if not lane.out and lane not in avoid and lane.serves(key)]

    def choose(
        self, key: Hashable, sizes: Sequence[int], now_s: float, avoid: Collection[Lane] = ()
    ) -> Choice | None:
        """Give the batches that wait, in order, each to the lane that finishes it first; the first of
        them whose lane is idle starts. None: all of them are best left waiting."""
        lanes = self.able(key, avoid)
        if len(lanes) == 1:
            return None if lanes[0].busy else Choice(lanes[0], 0)
        free_s = [_free_s(lane, now_s) for lane in lanes]
        given = [lane.busy for lane in lanes]
        for place, size in enumerate(sizes):
            best, best_s = -1, float("inf")
            for number, lane in enumerate(lanes):
                done_s = free_s[number] + lane.seconds(size)
                if done_s < best_s:
                    best, best_s = number, done_s
            if best < 0:
                return None
            if not given[best]:
                return Choice(lanes[best], place)
            free_s[best] = best_s
        return None

    def wait_s(self, key: Hashable, queued: int, max_batch: int, now_s: float, *, kept: int = 0) -> float:
        """Seconds until an item behind `queued` others is predicted to be answered; infinite where no
        lane can. So many lanes are `kept` for others, whichever they are."""
        lanes = self.able(key)
        if not lanes:
            return float("inf")
        free_s = [_free_s(lane, now_s) - now_s for lane in lanes]
        full_s = [lane.seconds(max_batch) for lane in lanes]
        rate = sum(max_batch / cost_s for cost_s in full_s) * max(1, len(lanes) - kept) / len(lanes)
        return min(free_s) + queued / rate + min(lane.seconds(min(queued + 1, max_batch)) for lane in lanes)


def _free_s(lane: Lane, now_s: float) -> float:
    """When a lane is expected to be free. One that is late already is expected to be late as long again."""
    if not lane.busy:
        return now_s
    return lane.free_at_s if lane.free_at_s > now_s else now_s + (now_s - lane.free_at_s)
