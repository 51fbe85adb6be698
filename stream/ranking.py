"""What a worker ranks with: the version that serves, those that are tried beside it, and the one before.

The registry's alias says which versions these are; an announcement says when to look. A version is
loaded, verified, warmed and asked recent requests beside the ones that serve; then one assignment
switches users over, and the old one finishes what it has accepted before it is freed. What goes wrong
on the way leaves everything as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from compression.aliases import AliasState, Release, Trial
from compression.errors import ArtefactInvalid
from compression.registry import Registry
from inference.errors import EngineFailed, InferenceError, ModelUnavailable
from inference.types import RankedList, RankRequest
from stream.comparison import Comparison, Sample
from stream.metrics import StreamMetrics
from stream.routing import Split
from stream.settings import StreamSettings
from stream.shadow import Shadow, unhurried

log = logging.getLogger(__name__)

# A canary that fails at so many requests in a row which the serving version answers gets no more.
CANARY_FAILURES: Final = 3
# Recent requests are ranked by a new version so many at a time, with a pause for those who wait.
CHECK_BATCH: Final = 4
CHECK_PAUSE_S: Final = 0.04
# A version that is to be freed waits so long for those who still ask it.
LET_GO_S: Final = 30.0
# Of each unit at most so many requests are remembered: a large one shall not push all others out.
REMEMBERED_PER_UNIT: Final = 4

Answers = list[RankedList | InferenceError]


class Opened(Protocol):
    """An open version; `inference.plane.Version` is one."""

    @property
    def version(self) -> str: ...
    @property
    def engine(self) -> str: ...


class Versions(Protocol):
    """What opens, asks and frees versions; `inference.plane.Plane` is one."""

    async def open(self, registry_root: Path, version: str, *, sha256: str | None = None) -> Any: ...
    async def rank(self, requests: Sequence[RankRequest], version: Any) -> Answers: ...
    async def rehearse(self, requests: Sequence[RankRequest], version: Any) -> Answers: ...
    async def retire(self, version: Any) -> None: ...
    async def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class Held:
    """An open version, and how much is asked of it. `release` says which bytes it was made from."""

    release: Release
    opened: Any
    checked: bool = False  # has ranked recent requests, or served before
    asked: int = 0
    failures: int = 0  # as canary, in a row
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def version(self) -> str:
        return self.release.version


@dataclass(frozen=True, slots=True)
class Arms:
    """Who answers. Replaced as a whole: a unit of requests sees one state of affairs."""

    serving: Held | None = None
    canary: Held | None = None
    split: Split | None = None
    shadow: Shadow | None = None
    shadowing: Held | None = None


class ServingModel:
    """What `stream.recommend` ranks with. Without a model every answer is `ModelUnavailable`, which the
    request path turns into what is popular: a new shop has lists before its first training."""

    def __init__(self, versions: Versions, settings: StreamSettings, metrics: StreamMetrics) -> None:
        self._versions = versions
        self._settings = settings
        self._metrics = metrics
        self._registry = Path(settings.registry)
        self._alias = settings.alias
        self._arms = Arms()
        self._held: dict[Release, Held] = {}
        self._previous: Release | None = None
        self._given_up: set[Release] = set()
        self._recent: deque[Sample] = deque(maxlen=settings.check_requests)
        self._live = 0
        self._checked: dict[str, Any] = {}
        self._refused: dict[str, str] = {}
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def version(self) -> str | None:
        return self._arms.serving.version if self._arms.serving else None

    @property
    def engine(self) -> str | None:
        return self._arms.serving.opened.engine if self._arms.serving else None

    # Answering ---------------------------------------------------------------------------------

    async def rank(self, requests: Sequence[RankRequest]) -> Answers:
        """A list or an error per request, each from the version of its user's arm."""
        arms = self._arms
        if arms.serving is None:
            return [ModelUnavailable("no model has been released yet")] * len(requests)
        self._live += len(requests)
        try:
            answers = await self._ask_arms(arms, arms.serving, requests)
        finally:
            self._live -= len(requests)
        self._remember(requests, answers)
        if arms.shadow is not None:
            arms.shadow.offer(requests, answers)
        return answers

    async def _ask_arms(self, arms: Arms, serving: Held, requests: Sequence[RankRequest]) -> Answers:
        if arms.canary is None or arms.split is None:
            return await self._ask(serving, "serving", requests)
        chosen = arms.split.chosen((request.user_id for request in requests), len(requests))
        if not chosen.any():
            return await self._ask(serving, "serving", requests)
        places = chosen.nonzero()[0].tolist(), (~chosen).nonzero()[0].tolist()
        tried, others = ([requests[place] for place in part] for part in places)
        found = await asyncio.gather(
            self._ask_canary(arms.canary, serving, tried), self._ask(serving, "serving", others)
        )
        answers: Answers = [*requests]  # type: ignore[list-item]  # every place is overwritten
        for part, part_answers in zip(places, found, strict=True):
            for place, answer in zip(part, part_answers, strict=True):
                answers[place] = answer
        return answers

    def _ask(self, held: Held, arm: str, requests: Sequence[RankRequest]) -> Coroutine[Any, Any, Answers]:
        # Not a coroutine itself: from this call on the version is in use, whenever the asking begins.
        held.asked += 1
        held.idle.clear()
        return self._asking(held, arm, requests)

    async def _asking(self, held: Held, arm: str, requests: Sequence[RankRequest]) -> Answers:
        try:
            if not requests:
                return []
            answers = await self._versions.rank(requests, held.opened)
        finally:
            held.asked -= 1
            if not held.asked:
                held.idle.set()
        failed = sum(isinstance(answer, InferenceError) for answer in answers)
        self._metrics.release_lists.labels(version=held.version, arm=arm).inc(len(answers) - failed)
        if failed:
            self._metrics.release_failures.labels(version=held.version, arm=arm).inc(failed)
        return answers

    def _ask_canary(
        self, canary: Held, serving: Held, requests: Sequence[RankRequest]
    ) -> Coroutine[Any, Any, Answers]:
        return self._asking_canary(canary, serving, requests, self._ask(canary, "canary", requests))

    async def _asking_canary(
        self,
        canary: Held,
        serving: Held,
        requests: Sequence[RankRequest],
        asking: Coroutine[Any, Any, Answers],
    ) -> Answers:
        """The canary's answers; where it fails, the serving version's, and in the end no more canary."""
        answers = await asking
        failed = [
            place
            for place, answer in enumerate(answers)
            if isinstance(answer, (EngineFailed, ModelUnavailable))
        ]
        if not failed:
            canary.failures = 0
            return answers
        why = answers[failed[0]]
        again = await self._ask(serving, "serving", [requests[place] for place in failed])
        for place, answer in zip(failed, again, strict=True):
            answers[place] = answer
            canary.failures += isinstance(answer, RankedList)
        if canary.failures >= CANARY_FAILURES and self._arms.canary is canary:
            self._give_up(canary, str(why))
        return answers

    def _give_up(self, canary: Held, why: str) -> None:
        """A canary that fails gets no more users until it is announced again."""
        self._arms = replace(self._arms, canary=None, split=None)
        self._given_up.add(canary.release)
        self._refuse("canary", canary.version, f"it failed at {canary.failures} requests in a row: {why}")
        self._later(self._settle())

    def _remember(self, requests: Sequence[RankRequest], answers: Answers) -> None:
        last = slice(-REMEMBERED_PER_UNIT, None)
        for request, answer in zip(requests[last], answers[last], strict=True):
            if isinstance(answer, RankedList):
                self._recent.append(Sample(request, answer))

    # Changing ----------------------------------------------------------------------------------

    async def load(self, announced: str | None = None, sha256: str | None = None) -> bool:
        """Take the alias's versions as they are now. Whether something has changed.

        An announcement read late, after a restart say, brings no old version back; one whose checksum
        is not that of the version it names changes nothing. A version that cannot be opened or fails
        its check is left out, and the log says why.
        """
        async with self._changing:
            what = announced or f"alias {self._alias!r}"
            try:
                state = await asyncio.to_thread(self._state)
                self._check_announcement(state, announced, sha256)
            except (ArtefactInvalid, OSError) as error:
                self._refuse("announcement", what, str(error))
                return False
            except Exception as error:
                log.exception("What %s stands for cannot be read", what)
                self._refuse("announcement", what, repr(error))
                return False
            self._given_up = {release for release in self._given_up if release.version != announced}
            self._refused.clear()
            before = self._arms
            await self._serve(state)
            await self._try_canary(state.canary)
            await self._try_shadow(state.shadow)
            self._previous = state.previous
            self._later(self._settle())
            return self._arms is not before

    def _state(self) -> AliasState:
        registry = Registry(self._registry)
        state = registry.state(self._alias)
        if state is None:
            # The setting may name a version: that one serves, and nothing is tried beside it.
            version = registry.resolve(self._alias)
            state = AliasState(version=version, manifest_sha256=registry.manifest_sha256(version))
        return state

    def _check_announcement(self, state: AliasState, announced: str | None, sha256: str | None) -> None:
        if announced is None:
            return
        named = (state.previous, state.shadow, state.canary, state.serving)
        known = {release.version: release.manifest_sha256 for release in named if release is not None}
        if announced not in known:
            log.info("%s was announced; %r stands for %s by now", announced, self._alias, state.version)
        elif sha256 is not None and known[announced] != sha256:
            promised, found = sha256[:12], known[announced][:12]
            raise ArtefactInvalid(f"{announced}: announced with checksum {promised}…, found {found}…")

    async def _serve(self, state: AliasState) -> None:
        """Switch to the version that serves; to the one before it where nobody serves yet and the first
        cannot."""
        current = self._arms.serving
        if current is not None and current.release == state.serving:
            return
        held = await self._open("serving", state.serving)
        if held is None and current is None and state.previous is not None:
            held = await self._open("previous", state.previous)
        if held is None:
            return
        arms = self._arms
        if arms.canary is not None and (state.canary is None or state.canary.version != arms.canary.version):
            arms = replace(arms, canary=None, split=None)
        self._arms = replace(arms, serving=held)
        log.info("Serving %s on %s", held.version, held.opened.engine)

    async def _try_canary(self, trial: Trial | None) -> None:
        held = await self._open_trial("canary", trial)
        if held is None or trial is None:
            if self._arms.canary is not None:
                self._arms = replace(self._arms, canary=None, split=None)
            return
        split = Split.of(trial.version, trial.percent)
        if self._arms.canary is not held or self._arms.split != split:
            held.failures = 0
            self._arms = replace(self._arms, canary=held, split=split)
            log.info("%s ranks for %g %% of the users", held.version, trial.percent)

    async def _try_shadow(self, trial: Trial | None) -> None:
        held = await self._open_trial("shadow", trial)
        if held is None or trial is None:
            await self._end_shadow()
            return
        share, current = trial.percent / 100, self._arms.shadow
        if current is not None and self._arms.shadowing is held and current.share == share:
            return
        await self._end_shadow()
        shadow = Shadow(partial(self._ask, held, "shadow"), share, self._busy, self._metrics)
        self._arms = replace(self._arms, shadow=shadow, shadowing=held)
        log.info("%s ranks %g %% of the requests for comparison", held.version, trial.percent)

    async def _end_shadow(self) -> None:
        """From here on nothing is asked of the version as a shadow."""
        shadow = self._arms.shadow
        if shadow is not None:
            self._arms = replace(self._arms, shadow=None, shadowing=None)
            await shadow.stop()

    async def _open_trial(self, stage: str, trial: Trial | None) -> Held | None:
        if trial is None or self._arms.serving is None:
            return None
        release = Release(version=trial.version, manifest_sha256=trial.manifest_sha256)
        if release in self._given_up:
            self._refused[stage] = f"{trial.version} failed before, and waits to be announced again"
            return None
        return await self._open(stage, release)

    async def _open(self, stage: str, release: Release) -> Held | None:
        """An open and warm version, checked if it is to answer anybody; None where it cannot be had,
        which the log explains."""
        held = self._held.get(release)
        try:
            if held is None:
                opened = await self._versions.open(
                    self._registry, release.version, sha256=release.manifest_sha256
                )
                held = self._held[release] = Held(release, opened)
                held.idle.set()
            if stage in ("serving", "canary") and not held.checked:
                if held is self._arms.shadowing:
                    await self._end_shadow()
                await self._check(held)
            # What served before is to be gone back to at once.
            held.checked = held.checked or stage == "previous"
        except (ArtefactInvalid, InferenceError, OSError, KeyError) as error:
            self._refuse(stage, release.version, str(error))
        except Exception as error:
            # Whatever a library makes of damaged files, the version that serves goes on serving.
            log.exception("%s cannot be opened", release.version)
            self._refuse(stage, release.version, repr(error))
        else:
            return held
        return None

    async def _check(self, held: Held) -> None:
        """Rank recent requests with a version before it answers anybody. Raises `ModelUnavailable` where a
        list is missing, too short or not finite, or takes too long: its lists need not be the same."""
        samples = list(self._recent)
        comparison = Comparison()
        for start in range(0, len(samples), CHECK_BATCH):
            part = samples[start : start + CHECK_BATCH]
            asked = unhurried((sample.request for sample in part), None)
            asked_s = time.perf_counter()
            answers = await self._versions.rehearse(asked, held.opened)
            comparison.add(part, answers, time.perf_counter() - asked_s)
            await asyncio.sleep(CHECK_PAUSE_S)
        figures = comparison.figures()
        self._checked = {"version": held.version, **figures}
        log.info("%s was asked %d recent requests: %s", held.version, len(samples), figures)
        if wrong := comparison.failed + comparison.short:
            raise ModelUnavailable(
                f"{held.version}: {wrong} of {len(samples)} recent requests went wrong: {comparison.reason}"
            )
        limit_s = self._settings.click_deadline_ms / 1000
        if comparison.median_s() > limit_s:
            raise ModelUnavailable(
                f"{held.version}: it takes {comparison.median_s():.2f} s for {CHECK_BATCH} lists, "
                f"which are due in {limit_s:g} s"
            )
        held.checked = True

    async def _settle(self) -> None:
        """Open the version before, to go back to at once; free what nobody needs any more."""
        async with self._changing:
            kept = self._previous if self._settings.keep_previous else None
            if kept is not None:
                await self._open("previous", kept)
            arms = (self._arms.serving, self._arms.canary, self._arms.shadowing)
            needed = {kept, *(held.release for held in arms if held is not None)}
            for release in [release for release in self._held if release not in needed]:
                self._later(self._free(self._held.pop(release)))

    async def _free(self, held: Held) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(held.idle.wait(), LET_GO_S)
        await self._versions.retire(held.opened)
        log.info("%s is no longer open", held.version)
        if all(other.version != held.version for other in self._held.values()):
            self._metrics.forget_version(held.version)

    async def settled(self) -> None:
        """Wait until what a change left to do is done."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Free everything. Nothing may be asked any more."""
        await self._end_shadow()
        self._arms = Arms()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._versions.close()

    # Telling -----------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What /models says."""
        arms = self._arms
        percent = arms.split.share / 100 if arms.split else None
        return {
            "alias": self._alias,
            "serving": _told(arms.serving),
            "canary": arms.canary and {**_told(arms.canary), "percent": percent},
            "shadow": arms.shadow
            and {
                **_told(arms.shadowing),
                "percent": round(100 * arms.shadow.share, 4),
                **arms.shadow.comparison.figures(),
            },
            "previous": self._previous and self._previous.version,
            "open": sorted({release.version for release in self._held}),
            "last_check": self._checked or None,
            "refused": self._refused,
        }

    def _refuse(self, stage: str, what: str, why: str) -> None:
        self._refused[stage] = why
        self._metrics.releases_refused.labels(stage=stage).inc()
        log.warning("%s is not taken as %s: %s", what, stage, why)

    def _busy(self) -> bool:
        return self._live > 0

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _told(held: Held | None) -> dict[str, Any]:
    return {"version": held.version, "engine": held.opened.engine} if held is not None else {}
