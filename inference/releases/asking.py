"""Requests to the versions of their users' arms, and the answers back in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from inference.errors import EngineFailed, InferenceError, ModelUnavailable
from inference.releases.held import Answers, Arms, Held, Versions
from inference.releases.metrics import ReleaseMetrics
from inference.types import RankedList, RankRequest

# A canary that fails at so many requests in a row which the serving version answers gets no more.
CANARY_FAILURES: Final = 3


class Asking:
    """Counts what each version is asked. `give_up` is told of a canary that keeps failing, and why."""

    def __init__(
        self, versions: Versions, metrics: ReleaseMetrics, give_up: Callable[[Held, str], None]
    ) -> None:
        self._versions = versions
        self._metrics = metrics
        self._give_up = give_up

    async def ask_arms(self, arms: Arms, serving: Held, requests: Sequence[RankRequest]) -> Answers:
        if arms.canary is None or arms.split is None:
            return await self.ask(serving, "serving", requests)
        chosen = arms.split.chosen((request.user_id for request in requests), len(requests))
        if not chosen.any():
            return await self.ask(serving, "serving", requests)
        places = chosen.nonzero()[0].tolist(), (~chosen).nonzero()[0].tolist()
        tried, others = ([requests[place] for place in part] for part in places)
        found = await asyncio.gather(
            self._ask_canary(arms.canary, serving, tried), self.ask(serving, "serving", others)
        )
        answers: Answers = [*requests]  # type: ignore[list-item]  # every place is overwritten
        for part, part_answers in zip(places, found, strict=True):
            for place, answer in zip(part, part_answers, strict=True):
                answers[place] = answer
        return answers

    def ask(self, held: Held, arm: str, requests: Sequence[RankRequest]) -> Coroutine[Any, Any, Answers]:
        # Not a coroutine itself: from this call on the version is in use, whenever the asking begins.
        held.asked += 1
        held.idle.clear()
        return self._asked(held, arm, requests)

    async def _asked(self, held: Held, arm: str, requests: Sequence[RankRequest]) -> Answers:
        try:
            if not requests:
                return []
            answers = await self._versions.rank(requests, held.opened)
        finally:
            held.asked -= 1
            if not held.asked:
                held.idle.set()
        failed = sum(isinstance(answer, InferenceError) for answer in answers)
        self._metrics.lists.labels(version=held.version, arm=arm).inc(len(answers) - failed)
        if failed:
            self._metrics.failures.labels(version=held.version, arm=arm).inc(failed)
        return answers

    def _ask_canary(
        self, canary: Held, serving: Held, requests: Sequence[RankRequest]
    ) -> Coroutine[Any, Any, Answers]:
        return self._asking_canary(canary, serving, requests, self.ask(canary, "canary", requests))

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
        again = await self.ask(serving, "serving", [requests[place] for place in failed])
        for place, answer in zip(failed, again, strict=True):
            answers[place] = answer
            canary.failures += isinstance(answer, RankedList)
        if canary.failures >= CANARY_FAILURES:
            self._give_up(canary, str(why))
        return answers
