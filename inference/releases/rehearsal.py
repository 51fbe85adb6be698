"""Recent requests, ranked by a version before it answers anybody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from inference.errors import ModelUnavailable
from inference.releases.comparison import Comparison, Sample
from inference.releases.held import Held, Versions
from inference.releases.shadow import unhurried

# So many at a time, with a pause for those who wait: as long as this, and longer on a slow machine.
BATCH: Final = 8
PAUSE_S: Final = 0.08
PAUSE: Final = 10.0
LONGEST_PAUSE_S: Final = 0.5


async def rehearse(versions: Versions, held: Held, samples: Sequence[Sample]) -> Comparison:
    """What a version answers to requests that were answered before."""
    comparison = Comparison()
    for start in range(0, len(samples), BATCH):
        part = samples[start : start + BATCH]
        asked = unhurried((sample.request for sample in part), None)
        asked_s = time.perf_counter()
        answers = await versions.rehearse(asked, held.opened)
        took_s = time.perf_counter() - asked_s
        comparison.add(part, answers, took_s)
        await asyncio.sleep(min(max(PAUSE_S, PAUSE * took_s), LONGEST_PAUSE_S))
    return comparison


def judge(version: str, comparison: Comparison, samples: int, limit_s: float) -> None:
    """Raises `ModelUnavailable` where a list is missing, too short or not finite, or takes too long: its
    lists need not be the same."""
    if wrong := comparison.failed + comparison.short:
        raise ModelUnavailable(
            f"{version}: {wrong} of {samples} recent requests went wrong: {comparison.reason}"
        )
    if comparison.median_s() > limit_s:
        raise ModelUnavailable(
            f"{version}: it takes {comparison.median_s():.2f} s for {BATCH} lists, "
            f"which are due in {limit_s:g} s"
        )
