"""How long a batch that is not full waits for company.

Waiting costs the first item what it waits and saves every item a share of what a batch costs however
small it is. What pays is decided by `tailrace bench batching`; `inference/LOG.md` has the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Queue(NamedTuple):
    """What waits, and what runs. Times are on the event loop's clock."""

    oldest_s: float  # when the item that has waited longest came
    queued: int
    max_batch: int
    running: bool  # whether a lane is at work
    now_s: float
    predicted_s: Callable[[int], float]  # what a batch of so many takes on the fastest lane


class Waiting(Protocol):
    """Asked whenever something changes. Full and urgent batches leave without asking."""

    def ripe_s(self, queue: Queue) -> float:
        """When the next batch should leave; what has passed is now."""

    def observe(self, items: int, waited_s: float, took_s: float) -> None:
        """A batch has run: its first item waited so long, the engine took so long."""


@dataclass(frozen=True, slots=True)
class Gather:
    """Leave at once while nothing runs; gather behind what runs, for `spread_s` at most.

    Items that come one by one while a lane works cost less together, when it is done, than side by
    side on the next lane; at low load nobody waits at all, so the wait adapts without a controller.
    """

    wait_s: float = 0.0
    spread_s: float = 0.025

    def ripe_s(self, queue: Queue) -> float:
        return queue.oldest_s + (max(self.wait_s, self.spread_s) if queue.running else self.wait_s)

    def observe(self, items: int, waited_s: float, took_s: float) -> None:
        """Nothing to learn."""
