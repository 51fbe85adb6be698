"""What a process ranks with: the version that serves, those that are tried beside it, and the one before.

The registry's alias says which versions these are; an announcement, or a look now and then, says when
to look. A version is loaded, verified, warmed and asked recent requests beside the ones that serve; then
one assignment switches users over, and the old one finishes what it has accepted before it is freed.
What goes wrong on the way leaves everything as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from compression.errors import ArtefactInvalid
from compression.releases.aliases import AliasState, Release, Trial
from inference.errors import (
    InferenceError,
    InvalidRequest,
    ModelNotFound,
    ModelUnavailable,
    Overloaded,
)
from inference.releases.alias import Alias, names_another
from inference.releases.asking import Asking
from inference.releases.comparison import Sample
from inference.releases.held import Answers, Arms, Held, Versions
from inference.releases.metrics import ReleaseMetrics
from inference.releases.rehearsal import judge, rehearse
from inference.releases.routing import Split
from inference.releases.settings import ReleaseRules
from inference.releases.shadow import Shadow
from inference.types import RankedList, RankRequest

log = logging.getLogger(__name__)

# A version that is to be freed waits so long for those who still ask it.
LET_GO_S: Final = 30.0
# Of each unit at most so many requests are remembered: a large one shall not push all others out.
REMEMBERED_PER_UNIT: Final = 4


class ServingModel:
    """What a process ranks with. Without a model every answer is `ModelUnavailable`; the stream turns
    that into what is popular: a new shop has lists before its first training."""

    def __init__(
        self,
        versions: Versions,
        rules: ReleaseRules,
        metrics: ReleaseMetrics,
        *,
        switched: Callable[[Held], None] = lambda held: None,
    ) -> None:
        """`switched` is told who serves from now on, in the step in which it begins."""
        self._versions = versions
        self._rules = rules
        self._metrics = metrics
        self._switched = switched
        self._asking = Asking(versions, metrics, self._give_up)
        self._alias = Alias(rules.registry, rules.alias)
        self._arms = Arms()
        self._held: dict[Release, Held] = {}
        self._pinned: set[Release] = set()
        self._previous: Release | None = None
        self._given_up: set[Release] = set()
        self._recent: deque[Sample] = deque(maxlen=rules.check_requests)
        self._live = 0
        self._seen: AliasState | str | None = None
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

    @property
    def refusal(self) -> str | None:
        """Why something of the alias was not taken as it was said, if so."""
        return next(iter(self._refused.values()), None)

    # Answering ---------------------------------------------------------------------------------

    async def rank(self, requests: Sequence[RankRequest], *, by_user: bool = True) -> Answers:
        """A list or an error per request, each from the version of its user's arm; from the one that
        serves where it is not known whose they are."""
        arms = self._arms
        if arms.serving is None:
            return [ModelUnavailable("no model has been released yet")] * len(requests)
        self._live += len(requests)
        try:
            if by_user:
                answers = await self._asking.ask_arms(arms, arms.serving, requests)
            else:
                answers = await self._asking.ask(arms.serving, "serving", requests)
        finally:
            self._live -= len(requests)
        self._remember(requests, answers)
        if arms.shadow is not None:
            arms.shadow.offer(requests, answers)
        return answers

    def _give_up(self, canary: Held, why: str) -> None:
        """A canary that fails gets no more users until it is announced again."""
        if self._arms.canary is not canary:
            return
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
            # A name from the topic is anybody's text, and goes into the log escaped.
            alias = f"alias {self._alias.name!r}"
            what = repr(announced) if announced else alias
            try:
                state = await self._alias.read()
            except ModelUnavailable as error:
                self._seen = str(error)
                self._refuse("announcement", what, str(error))
                return False
            if announced is not None and (wrong := names_another(state, announced, sha256)):
                self._refuse("announcement", what, wrong)
                return False
            if announced is not None and announced not in state.stages():
                log.info("%s was announced; %s stands for %s by now", what, alias, state.version)
            self._forgive(state, announced)
            self._seen = state
            return await self._take(state)

    async def moved(self) -> bool:
        """Whether the alias says something else than it did when it was last taken."""
        try:
            state: AliasState | str = await self._alias.read()
        except ModelUnavailable as error:
            state = str(error)
        return state != self._seen

    async def watch(self, poll_s: float, load: Callable[[], Awaitable[object]]) -> None:
        """Look at the alias as long as the process lives, and `load` when it has moved: a change that
        nobody announced, or that was announced to nobody, is noticed all the same."""
        while True:
            await asyncio.sleep(poll_s)
            if await self.moved():
                await load()

    async def _take(self, state: AliasState) -> bool:
        self._refused.clear()
        before = self._arms
        await self._serve(state)
        await self._try_canary(state.canary)
        await self._try_shadow(state.shadow)
        self._previous = state.previous
        self._later(self._settle())
        return self._arms is not before

    def _forgive(self, state: AliasState, announced: str | None) -> None:
        """Who was given up is tried again when announced anew, or put into its place anew."""
        seen = self._seen if isinstance(self._seen, AliasState) else state
        unchanged = {state.serving, *_releases(seen.canary if seen.canary == state.canary else None)}
        unchanged.update(_releases(seen.shadow if seen.shadow == state.shadow else None))
        self._given_up = {release for release in self._given_up & unchanged if release.version != announced}

    # By hand -----------------------------------------------------------------------------------

    async def serve(self, name: str, sha256: str | None = None) -> str:
        """Let a version, or what an alias stands for, serve all users of this process until its own
        alias changes; which it was. Raises `ModelUnavailable` with the reason, nothing being changed."""
        async with self._changing:
            state = await self._alias.resolve(name, sha256)
            current = self._arms.serving
            if current is None or current.release != state.serving:
                previous = current.release if current is not None else None
                if await self._open("serving", state.serving) is None:
                    self._later(self._settle())
                    raise ModelUnavailable(self._refused["serving"])
                await self._take(state.model_copy(update={"previous": previous}))
            return state.version

    async def pin(self, name: str, sha256: str | None = None, *, most: int = 64) -> str:
        """Open a version beside the others, for those who ask for it by name, and keep it until `unpin`;
        which it was. Raises `ModelUnavailable` with the reason, `Overloaded` where `most` are open."""
        async with self._changing:
            state = await self._alias.resolve(name, sha256)
            if state.serving not in self._held:
                if len(self._held) >= most:
                    raise Overloaded(f"{len(self._held)} versions are loaded already: unload one")
                await self._opened(state.serving)
            self._pinned.add(state.serving)
            return state.version

    async def unpin(self, version: str) -> None:
        """Let a version go that answers nobody by itself; returns when it is freed."""
        async with self._changing:
            found = [held for held in self._held.values() if held.version == version]
            if not found:
                raise ModelNotFound(f"version {version[:64]!r} is not loaded")
            for held in found:
                stage = self._arms.stage(held)
                if stage is not None:
                    words = "serves: load another one" if stage == "serving" else f"is the {stage}: end that"
                    raise InvalidRequest(f"{version} {words} first")
            for held in found:
                self._pinned.discard(held.release)
                if self._previous == held.release:
                    self._previous = None
                del self._held[held.release]
        await asyncio.gather(*map(self._free, found))

    # Switching ---------------------------------------------------------------------------------

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
        self._switched(held)
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
        shadow = Shadow(partial(self._asking.ask, held, "shadow"), share, self._busy, self._metrics)
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
        release = _release(trial)
        if release in self._given_up:
            self._refused[stage] = f"{trial.version} failed before, and waits to be announced again"
            return None
        return await self._open(stage, release)

    async def _open(self, stage: str, release: Release) -> Held | None:
        """An open and warm version, checked if it is to answer anybody; None where it cannot be had,
        which the log explains."""
        try:
            held = await self._opened(release)
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

    async def _opened(self, release: Release) -> Held:
        held = self._held.get(release)
        if held is None:
            started_s = time.perf_counter()
            opened = await self._versions.open(
                self._rules.registry, release.version, sha256=release.manifest_sha256
            )
            held = self._held[release] = Held(release, opened, time.perf_counter() - started_s)
            held.idle.set()
        return held

    async def _check(self, held: Held) -> None:
        """Rank recent requests with a version before it answers anybody. Raises `ModelUnavailable`."""
        samples = list(self._recent)
        comparison = await rehearse(self._versions, held, samples)
        figures = comparison.figures()
        self._checked = {"version": held.version, **figures}
        log.info("%s was asked %d recent requests: %s", held.version, len(samples), figures)
        judge(held.version, comparison, len(samples), self._rules.check_limit_s)
        held.checked = True

    async def _settle(self) -> None:
        """Open the version before, to go back to at once; free what nobody needs any more."""
        async with self._changing:
            kept = self._previous if self._rules.keep_previous else None
            if kept is not None:
                await self._open("previous", kept)
            arms = (self._arms.serving, self._arms.canary, self._arms.shadowing)
            needed = {kept, *self._pinned, *(held.release for held in arms if held is not None)}
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

    def listed(self) -> list[dict[str, Any]]:
        """Each open version, whom it answers, and how long opening it took."""
        rows = []
        for release, held in sorted(self._held.items(), key=lambda item: item[0].version):
            stage = self._arms.stage(held) or ("previous" if release == self._previous else None)
            rows.append(
                {
                    "version": held.version,
                    "serving": stage == "serving",
                    "stage": stage,
                    "by_hand": release in self._pinned,
                    "engine": held.opened.engine,
                    "loaded_s": round(held.opened_s, 3),
                }
            )
        return rows

    def describe(self) -> dict[str, Any]:
        """What /models says."""
        arms = self._arms
        percent = arms.split.share / 100 if arms.split else None
        return {
            "alias": self._alias.name,
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
            "by_hand": sorted({release.version for release in self._pinned}),
            "last_check": self._checked or None,
            "refused": self._refused,
        }

    def _refuse(self, stage: str, what: str, why: str) -> None:
        self._refused[stage] = why
        self._metrics.refused.labels(stage=stage).inc()
        log.warning("%s is not taken as %s: %s", what, stage, why)

    def _busy(self) -> bool:
        return self._live > 0

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _releases(trial: Trial | None) -> set[Release]:
    return set() if trial is None else {_release(trial)}


def _release(trial: Trial) -> Release:
    return Release(version=trial.version, manifest_sha256=trial.manifest_sha256)


def _told(held: Held | None) -> dict[str, Any]:
    return {"version": held.version, "engine": held.opened.engine} if held is not None else {}
