"""The inference plane of a process: released versions on lanes, one dispatcher for all of them.

A lane is a thread with one engine per open version. Versions share lanes, so a canary or a version
that is being switched to takes no more of the machine than it answers. What an engine fails at, or
hangs on, goes to another lane; the lane gets a spare engine that was warmed before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from features.settings import FeatureSettings
from features.statistics import ItemStatistics
from inference.batcher import Batcher
from inference.dispatcher import SLOW, Lane, leave_room
from inference.engines.base import Shape
from inference.errors import EngineFailed, InferenceError, ModelUnavailable
from inference.lanes import LaneSpec
from inference.memory import give_back
from inference.own_folder import own_folder, user_cache
from inference.prepared import Prepared, Wanted, prepare
from inference.preparing import Preparer
from inference.profile import LatencyProfile
from inference.ranker import Ranker, Warmed
from inference.settings import InferenceSettings
from inference.types import RankedList, RankRequest

log = logging.getLogger(__name__)

DRAIN_S: Final = 10.0
# Opening a version leaves the processor to what serves. After each piece of work comes a rest so many
# times as long, a short one where nobody was served meanwhile. A low priority is only for long work without
# the interpreter's lock: a thread that holds the lock and is not let on a processor keeps all others waiting
# (68 ms were seen at 350 lists/s).
_REST: Final = 14.0
_REST_ALONE: Final = 2.0
_LONGEST_REST_S: Final = 0.5
# The first requests of a version that was switched to find cold caches; freeing the one before, which holds
# everybody up for some milliseconds, comes when they have been answered.
_BREATH_S: Final = 0.2
# So often is a lane's probe run at most.
_PROBES: Final = 3

A = TypeVar("A")


class Version:
    """A released version that is open: one warmed engine per lane, and spares."""

    def __init__(self, ranker: Ranker) -> None:
        self.version = ranker.version
        self.ranker = ranker
        self.warmed: dict[str, Warmed] = {}
        self.spares: dict[tuple[str, object], list[Warmed]] = {}
        self.cold_start_s = 0.0
        self.in_flight = 0
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def engine(self) -> str:
        """The engines it runs on: `onnx`, or `onnx+openvino`."""
        return "+".join(dict.fromkeys(warmed.name for warmed in self.warmed.values()))

    def free(self, rest: Callable[[], bool] = lambda: False) -> None:
        """Let go of all that it is made of, whoever still holds it, with a `rest` after each engine. Nobody
        may ask it any more."""
        for warmed in (*self.warmed.values(), *(one for kept in self.spares.values() for one in kept)):
            warmed.close()
            rest()
        self.warmed.clear()
        self.spares.clear()
        del self.ranker


class Plane:
    """Opens versions, ranks with them, frees them. Used from one event loop."""

    def __init__(
        self, settings: InferenceSettings, features: FeatureSettings, statistics: ItemStatistics
    ) -> None:
        self._settings = settings
        self._features = features
        self._statistics = statistics
        self._specs = {spec.name: spec for spec in settings.lane_specs()}
        self._versions: list[Version] = []
        self._batcher: Batcher[RankRequest, RankedList] | None = None
        self._quiet = ThreadPoolExecutor(1, thread_name_prefix="warming")
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="aside", initializer=leave_room)
        self._preparer = Preparer()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = threading.Event()
        self._began_s = 0.0  # the quiet thread's own time when its last piece of work began
        self._asked = 0  # how often anybody has asked, and until when the quiet thread knows of it
        self._asked_before = 0

    @property
    def batcher(self) -> Batcher[RankRequest, RankedList]:
        """Made when it is first used: its threads belong to the loop that runs."""
        if self._batcher is None:
            lanes = [self._lane(spec) for spec in self._specs.values()]
            self._batcher = Batcher(lanes, self._settings.batcher_limits(), replace=self._replace)
        return self._batcher

    @property
    def versions(self) -> Sequence[Version]:
        return tuple(self._versions)

    async def open(self, registry_root: Path | str, alias: str, *, sha256: str | None = None) -> Version:
        """Verify, load and warm a version on every lane; it serves nobody yet.

        `sha256` is the manifest's, as announced. Raises `ModelUnavailable` with the reason. A lane whose
        engine cannot be had is left out where it is on another machine; it is tried again when asked for.
        """
        started_s = time.perf_counter()
        version = Version(await self._quietly(partial(self._ranker, registry_root, alias, sha256)))
        lanes = {lane.name: lane for lane in self.batcher.dispatcher.lanes}
        try:
            for name, spec in self._specs.items():
                try:
                    warmed = self._beside(version, spec)
                    if warmed is None:
                        warmed = await self._quietly(partial(self._warm, version, spec))
                    version.warmed[name] = warmed
                except ModelUnavailable as error:
                    if spec.engine != "remote":
                        raise
                    log.warning("Lane %s does not serve %s: %s", name, version.version, error)
            if not version.warmed:
                raise ModelUnavailable(f"{version.version}: no lane could be warmed")
            users = max((other.ranker.users for other in self._versions), default=0)
            await self._quietly(partial(version.ranker.make_room, users, self._rest))
        except BaseException:
            self._free(version)
            raise
        if not self._versions:
            for name, warmed in version.warmed.items():
                lanes[name].profile = LatencyProfile(warmed.cost_s(self._settings.max_batch))
        version.cold_start_s = time.perf_counter() - started_s
        self._versions.append(version)
        for spec in {spec.kind: spec for spec in self._specs.values()}.values():
            for _ in range(self._settings.spares if spec.engine != "remote" else 0):
                self._later(self._warm_spare(version, spec))
        log.info("%s is warm on %s after %.1f s", version.version, version.engine, version.cold_start_s)
        return version

    async def rank(
        self, requests: Sequence[RankRequest], version: Version
    ) -> list[RankedList | InferenceError]:
        """One answer per request, in order; failures are answers."""
        self._asked += 1
        version.in_flight += 1
        version.idle.clear()
        try:
            return await self.batcher.submit(requests, version)
        finally:
            version.in_flight -= 1
            if not version.in_flight:
                version.idle.set()

    async def rehearse(
        self, requests: Sequence[RankRequest], version: Version
    ) -> list[RankedList | InferenceError]:
        """Rank with a version that serves nobody yet, behind everything that somebody waits for: in the
        thread that warms, so that what is wrong with the version is not held against a lane."""
        warmed = next(iter(version.warmed.values()))
        rank = partial(version.ranker.rank, warmed, list(requests), self._statistics)
        try:
            return await self._quietly(rank)
        except InferenceError as error:
            return [error] * len(requests)

    async def retire(self, version: Version, timeout_s: float = DRAIN_S) -> None:
        """Let a version finish what it has accepted, then free it. Nobody may ask it any more."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(version.idle.wait(), timeout_s)
        # An answer that came too late for its deadline may still be computed.
        loop = asyncio.get_running_loop()
        lanes = self.batcher.dispatcher.lanes
        await asyncio.wait(
            [loop.run_in_executor(lane.executor, _nothing) for lane in lanes], timeout=timeout_s
        )
        if version in self._versions:
            self._versions.remove(version)
        if self._versions:
            await asyncio.sleep(_BREATH_S)
        await self._quietly(partial(self._free, version, self._rest))

    async def settled(self) -> None:
        """Wait until the spares that are wanted are warm."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Drain, then free everything."""
        self._closing.set()
        for task in list(self._tasks):
            task.cancel()
        for executor in (self._quiet, self._aside):
            executor.shutdown(wait=False, cancel_futures=True)
        if self._batcher is not None:
            await self._batcher.drain(DRAIN_S)
        versions, self._versions = self._versions, []
        for version in versions:
            await asyncio.to_thread(self._free, version)
        await asyncio.to_thread(self._preparer.close)

    # Lanes -------------------------------------------------------------------------------------

    def _lane(self, spec: LaneSpec) -> Lane:
        return Lane(
            spec.name,
            partial(self._run, spec.name),
            serves=lambda version: spec.name in version.warmed,
            probe=partial(self._probe, spec.name),
            hop_s=spec.hop_ms / 1e3,
            region=spec.region,
        )

    def _run(
        self, lane: str, version: Version, requests: list[RankRequest]
    ) -> list[RankedList | InferenceError]:
        return version.ranker.rank(version.warmed[lane], requests, self._statistics)

    def _probe(self, lane: str) -> float:
        """In the lane's thread: how many times what it takes at full speed, the best of a few tries, because
        one may wait for the interpreter's lock. Raises where one of its engines is not well."""
        best = math.inf
        for _ in range(_PROBES):
            best = min(best, self._probed(lane))
            if best < SLOW:
                break
        return best

    def _probed(self, lane: str) -> float:
        began_s, expected_s = time.perf_counter(), 0.0
        for version in list(self._versions):
            warmed = version.warmed.get(lane)
            if warmed is not None:
                expected_s += version.ranker.probe(warmed)
        return (time.perf_counter() - began_s) / expected_s if expected_s else 1.0

    def _replace(self, lane: Lane) -> bool:
        """Give a lane a warmed spare, and warm the next one. Whether there was one."""
        spec = self._specs[lane.name]
        replaced = False
        for version in self._versions:
            spares = version.spares.get(spec.kind)
            if lane.name in version.warmed and spares:
                # The engine before it may still be running: it goes when its thread lets go of it.
                version.warmed[lane.name] = spares.pop()
                lane.pause_s = min(lane.pause_s, 0.01)
                log.info("Lane %s continues on a spare engine", lane.name)
                self._later(self._warm_spare(version, spec))
                replaced = True
        return replaced

    async def _warm_spare(self, version: Version, spec: LaneSpec) -> None:
        if version not in self._versions:
            return
        try:
            warmed = await self._quietly(partial(self._warm, version, spec))
        except (ModelUnavailable, EngineFailed) as error:
            log.warning("No spare of %s for %s: %s", spec.name, version.version, error)
            return
        if version in self._versions:
            version.spares.setdefault(spec.kind, []).append(warmed)
        else:
            warmed.close()

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Loading -----------------------------------------------------------------------------------

    def _ranker(self, root: Path | str, alias: str, sha256: str | None) -> Ranker:
        return Ranker.open(
            root,
            alias,
            sha256=sha256,
            settings=self._settings,
            features=self._features,
            rest=self._rest,
            aside=lambda work: self._aside.submit(work).result(),
            prepared=self._prepared(root, alias, sha256),
        )

    def _prepared(self, root: Path | str, alias: str, sha256: str | None) -> Prepared | None:
        """A version, verified and ready to be loaded in milliseconds: by a process of its own where requests
        are served here. None where nothing can be kept on this machine."""
        settings = self._settings
        wanted = Wanted(
            registry=str(root),
            version=alias,
            sha256=sha256,
            engines=tuple({spec.kind: None for spec in self._specs.values()}),
            cached=settings.cache_mb > 0,
            exact_until=settings.exact_until,
            probes=settings.probes,
        )
        try:
            own_folder(user_cache() / "prepared")
        except ModelUnavailable as error:
            log.warning("Versions are prepared while they are opened: %s", error)
            return None
        if not self._versions:
            return prepare(wanted)
        try:
            told = self._preparer.prepare(wanted.to_json(), self._closing.is_set, self._is_asked)
            return Prepared.from_json(told)
        except OSError as error:
            log.warning("A version is prepared while it is opened: %s", error)
            return None

    def _beside(self, version: Version, spec: LaneSpec) -> Warmed | None:
        """One of the engines that this version has, for one more lane of its kind."""
        warmed = self._like(version, spec)
        return None if warmed is None else version.ranker.beside(warmed)

    def _like(self, version: Version, spec: LaneSpec) -> Warmed | None:
        """A warm engine of this kind, if the version has one."""
        warmed = list(version.warmed.items())  # a lane may be added meanwhile
        return next((one for name, one in warmed if self._specs[name].kind == spec.kind), None)

    def _warm(self, version: Version, spec: LaneSpec) -> Warmed:
        """One more engine. Its shapes cost what they cost its like: then each is run once, not timed."""
        return version.ranker.warm(spec.engine, spec.options, self._rest, self._costs_s(version, spec))

    def _costs_s(self, version: Version, spec: LaneSpec) -> Mapping[Shape, float]:
        for other in (version, *self._versions):
            warmed = self._like(other, spec) if other.ranker.model == version.ranker.model else None
            if warmed is not None:
                return warmed.buckets.cost_s
        return {}

    def _rest(self) -> bool:
        """Between two pieces of work of the quiet thread: leave room where somebody is served. True when
        there is no need to go on."""
        if self._versions:
            # By what it had of the processor: waiting for others was a rest already.
            worked_s = time.thread_time() - self._began_s
            rest = _REST if self._is_asked() else _REST_ALONE
            self._closing.wait(min(rest * worked_s, _LONGEST_REST_S))
        self._began_s = time.thread_time()
        return self._closing.is_set()

    def _is_asked(self) -> bool:
        """Whether anybody was served, or waits, since this was called last. From the quiet thread only."""
        before, self._asked_before = self._asked_before, self._asked
        return self._asked_before != before or any(version.in_flight for version in tuple(self._versions))

    async def _quietly(self, work: Callable[[], A]) -> A:
        return await asyncio.get_running_loop().run_in_executor(self._quiet, self._begun(work))

    def _begun(self, work: Callable[[], A]) -> Callable[[], A]:
        def begun() -> A:
            self._began_s = time.thread_time()
            return work()

        return begun

    @staticmethod
    def _free(version: Version, rest: Callable[[], bool] = lambda: False) -> None:
        # Everything goes before what is freed is given back, in the thread that nobody waits for.
        version.free(rest)
        rest()
        give_back()


def _nothing() -> None:
    """What a lane's thread does after all that was given to it before."""
