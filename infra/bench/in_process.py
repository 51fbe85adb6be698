"""Open-loop load on the inference plane alone, in one process: no broker, no Redis.

Requests are due at times that are drawn beforehand, and latency counts from when they were due. The
histories are those of a log's users, the item statistics what its events leave behind.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from features.memory_store import MemoryStore
from features.statistics import ItemStatistics
from features.store import Append
from inference.errors import InferenceError
from inference.types import RankedList, RankRequest
from topics.messages import BEHAVIORS, BehaviorEvent

_CODES = {name: code for code, name in enumerate(BEHAVIORS)}
_BLOCK = 512
_SLEEP_STEP_S = 0.0005

Ask = Callable[[Sequence[RankRequest]], Awaitable[Sequence[RankedList | InferenceError]]]
Seconds = npt.NDArray[np.float64]


async def prepare(events: Sequence[BehaviorEvent]) -> tuple[list[RankRequest], ItemStatistics]:
    """One request per event, with the history its user had by then, and the statistics after all of them."""
    store = MemoryStore()
    statistics = ItemStatistics(store)
    requests: list[RankRequest] = []
    for start in range(0, len(events), _BLOCK):
        appends = [
            Append(
                event.user_id,
                event.item_id,
                event.category_id,
                _CODES[event.behavior],
                event.timestamp,
                1,
                0,
                start + number,
            )
            for number, event in enumerate(events[start : start + _BLOCK])
        ]
        appended, _ = await store.append(appends)
        statistics.observe(appends, appended)
        requests += [
            RankRequest(append.user_id, done.sequence) for append, done in zip(appends, appended, strict=True)
        ]
    await statistics.flush()
    await statistics.refresh()
    return requests, statistics


def tune() -> None:
    """As a worker is tuned (`stream.worker`): long-lived objects frozen, the interpreter handed over soon."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
    sys.setswitchinterval(0.0005)


@dataclass(frozen=True, slots=True)
class Outcomes:
    """One row per request: when it was due [n], how long its answer took [n] (NaN where none came), and
    the name of its error, or "" [n]."""

    due_s: Seconds
    took_s: Seconds
    errors: npt.NDArray[np.str_]

    @property
    def unanswered(self) -> int:
        return int(np.isnan(self.took_s).sum())

    def failed(self, *but: str) -> int:
        return int(((self.errors != "") & ~np.isin(self.errors, but)).sum())

    def p_ms(self, percentile: float, where: npt.NDArray[np.bool_] | None = None) -> float:
        took_s = self.took_s if where is None else self.took_s[where]
        took_s = took_s[~np.isnan(took_s)]
        return float(np.percentile(took_s, percentile) * 1e3) if len(took_s) else float("nan")


async def drive(
    ask: Ask,
    requests: Sequence[RankRequest],
    due_s: Seconds,
    *,
    deadline_s: float | None = None,
    patience_s: float = 10.0,
    enough: asyncio.Event | None = None,
    first: int = 0,
) -> Outcomes:
    """Ask each request when it is due, whether or not others are answered; all that are due in one turn of
    the loop go together. Requests are taken in turn from `first` on, over again where there are fewer than
    due times. Those due after `enough` are left out."""
    import dataclasses

    loop = asyncio.get_running_loop()
    took_s = np.full(len(due_s), np.nan)
    errors = np.full(len(due_s), "", "U24")
    began_s = loop.time() + 0.05
    waiting: set[asyncio.Task[None]] = set()

    async def one_group(first: int, group: list[RankRequest]) -> None:
        answers = await ask(group)
        now_s = loop.time() - began_s
        for number, answer in enumerate(answers, first):
            took_s[number] = now_s - due_s[number]
            if isinstance(answer, InferenceError):
                errors[number] = type(answer).__name__

    number = 0
    while number < len(due_s) and not (enough is not None and enough.is_set()):
        now_s = loop.time() - began_s
        ready = int(np.searchsorted(due_s, now_s, side="right"))
        if ready > number:
            group = [requests[place % len(requests)] for place in range(first + number, first + ready)]
            if deadline_s is not None:
                group = [
                    dataclasses.replace(request, deadline_s=began_s + due_s[number + place] + deadline_s)
                    for place, request in enumerate(group)
                ]
            task = asyncio.create_task(one_group(number, group))
            waiting.add(task)
            task.add_done_callback(waiting.discard)
            number = ready
            await asyncio.sleep(0)
        else:
            await asyncio.sleep(max(_SLEEP_STEP_S, due_s[number] - now_s))
    if waiting:
        await asyncio.wait(waiting, timeout=patience_s)
    for task in list(waiting):
        task.cancel()
    # Copies: who keeps a few of many shall not keep all of them in memory.
    return Outcomes(due_s[:number].copy(), took_s[:number].copy(), errors[:number].copy())


async def capacity(
    ask: Ask, requests: Sequence[RankRequest], *, seconds: float, at_once: int = 128, first: int = 0
) -> float:
    """Lists a second when as many as `at_once` requests are always waiting; taken in turn from `first` on."""
    ends_s = time.perf_counter() + seconds
    done = 0

    async def keep_asking(number: int) -> None:
        nonlocal done
        while time.perf_counter() < ends_s:
            answers = await ask([requests[number % len(requests)]])
            done += not isinstance(answers[0], InferenceError)
            number += at_once

    began_s = time.perf_counter()
    await asyncio.gather(*(keep_asking(number) for number in range(first, first + at_once)))
    return done / (time.perf_counter() - began_s)


def run_on_uvloop(story: Awaitable[Any]) -> Any:
    """On the loop that a worker runs on."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_awaited(story))


async def _awaited(story: Awaitable[Any]) -> Any:
    return await story
