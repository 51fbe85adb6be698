"""THE PAGE TO READ: requests in, who is refused out.

    deadline → the user's own rate → the tier's rate → room in hand

Each step sees only whom the one before let through, the highest level (tier, then priority) first, and
tokens are taken at the end for those who pass them all: a user over his rate costs his tier nothing. A
batch costs the same few numpy calls whatever its size. Used from one event loop; the clock is the
loop's, in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final, Literal, NamedTuple, Self

import numpy as np

from inference.admission.clients import ClientBuckets, places
from inference.admission.concurrency import AdaptiveLimit, ConcurrencyLimits
from inference.admission.leases import Leases, SharedRate
from inference.admission.settings import AdmissionSettings
from inference.admission.shared import CountedRate
from inference.admission.tiers import PRIORITIES, PRIORITY_CODES, Tiers
from inference.errors import DeadlineExceeded, InferenceError, Overloaded
from inference.types import RankedList, RankRequest

Reason = Literal["deadline", "client-rate", "tier-rate", "concurrency"]
_REASONS: Final[tuple[Reason, ...]] = ("deadline", "client-rate", "tier-rate", "concurrency")
_ERRORS: Final[tuple[InferenceError, ...]] = (
    DeadlineExceeded("less time is left before the deadline than a list takes"),
    Overloaded("the user's rate is used up"),
    Overloaded("the tier's rate is used up"),
    Overloaded("no room among the lists in hand"),
)
# The fastest list of the last second or two tells what cannot be done in less.
_FASTEST_FOR_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the request at a position is not ranked."""

    reason: Reason
    error: InferenceError


class Group(NamedTuple):
    """Admitted requests of one batch with their positions in it, in hand until `Admission.finish`: the
    top tier's by themselves, since how long those wait is looked at by itself."""

    number: int
    is_top: bool
    positions: Sequence[int]
    requests: Sequence[RankRequest]


class Ticket(NamedTuple):
    """What came of one batch: each of its positions is in one group or refused."""

    groups: list[Group]
    refused: dict[int, Refusal]


class Admission:
    """One per process, in front of everything that ranks."""

    def __init__(self, settings: AdmissionSettings, limits: ConcurrencyLimits, rate: SharedRate) -> None:
        """`of` makes the limits and the rate from the settings."""
        self.tiers = Tiers(settings)
        self.leases = Leases(settings, rate)
        self.limit = AdaptiveLimit(limits, PRIORITIES * len(self.tiers), PRIORITIES)
        self.queue_target_s = limits.queue_target_ms / 1000
        self._adaptive = settings.adaptive
        self._ceiling = limits.ceiling
        self._clients = ClientBuckets(settings.clients_kept) if self.tiers.any_client_limit else None
        self._any_rate = self.leases.any_limit or self._clients is not None
        self._numbers = count()
        # Groups in hand, oldest first: those of lower tiers, those of the top one.
        self._since_s: tuple[dict[int, float], dict[int, float]] = ({}, {})
        self._fastest_s = self._fastest_before_s = 0.0
        self._fastest_from_s = 0.0

    @classmethod
    def of(
        cls, settings: AdmissionSettings, *, ceiling: int, queue_target_ms: float, redis_url: str | None
    ) -> Self:
        """`ceiling` and `queue_target_ms` hold where the settings leave them open; rates are shared through
        `redis_url` where the settings want that."""
        limits = ConcurrencyLimits(
            floor=settings.floor,
            ceiling=settings.ceiling or ceiling,
            queue_target_ms=settings.queue_target_ms or queue_target_ms,
            lag_target_ms=settings.lag_target_ms,
            cpu_high=settings.cpu_high,
        )
        rate = CountedRate(redis_url if settings.shared else None, settings.lease_timeout_ms / 1000)
        return cls(settings, limits, rate)

    def admit(
        self, requests: Sequence[RankRequest], now_s: float, *, whole: bool = False, by_user: bool = True
    ) -> Ticket:
        """Let in whom there is room for. Each group must be finished, whatever becomes of it.

        `whole`: all of them or nobody, and then nothing is used up. Without `by_user` it is not known
        whose the requests are, and no user's own rate holds.
        """
        refused = self._refuse(requests, now_s, whole, by_user)
        if whole and refused:
            return Ticket([], refused)
        top = len(self.tiers) - 1
        of_tier: tuple[list[int], list[int]] = ([], [])
        for at, request in enumerate(requests):
            if at not in refused:
                of_tier[request.tier >= top].append(at)
        groups = []
        for is_top, positions in zip((False, True), of_tier, strict=True):
            if positions:
                number = next(self._numbers)
                self.limit.enter(len(positions), is_top=is_top)
                self._since_s[is_top][number] = now_s
                groups.append(Group(number, is_top, positions, [requests[at] for at in positions]))
        return Ticket(groups, refused)

    def finish(
        self, group: Group, now_s: float, outcomes: Sequence[RankedList | InferenceError] = ()
    ) -> None:
        """The group has these outcomes, or none, and is no longer in hand. Once more does nothing."""
        since_s = self._since_s[group.is_top].pop(group.number, None)
        if since_s is None:
            return
        self.limit.leave(len(group.requests), is_top=group.is_top)
        took_ms, waited_ms, lists = (now_s - since_s) * 1000, 0.0, 0
        for outcome in outcomes:
            if isinstance(outcome, RankedList):
                ranked_ms = outcome.timings_ms.get("rank", 0.0)
                waited_ms += outcome.timings_ms.get("queue", took_ms - ranked_ms)
                if ranked_ms and (not self._fastest_s or ranked_ms < self._fastest_s * 1000):
                    self._fastest_s = ranked_ms / 1000
            elif isinstance(outcome, (DeadlineExceeded, Overloaded)):
                waited_ms += took_ms
            else:
                continue
            lists += 1
        if lists:
            self.limit.waited(max(0.0, waited_ms / lists / 1000), lists, is_top=group.is_top)

    def update(self, now_s: float, *, lag_s: float, cpu: float) -> None:
        """Adapt the limit; called many times a second. `lag_s`: how late the loop ran this call."""
        if now_s - self._fastest_from_s >= _FASTEST_FOR_S:
            self._fastest_before_s, self._fastest_s = self._fastest_s, 0.0
            self._fastest_from_s = now_s
        if self._adaptive:
            latest_s = now_s - self.fastest_s
            lower_s, top_s = (latest_s - next(iter(since.values()), now_s) for since in self._since_s)
            self.limit.update(now_s, oldest_lower_s=lower_s, oldest_top_s=top_s, lag_s=lag_s, cpu=cpu)

    @property
    def fastest_s(self) -> float:
        """No list of late was ranked in less; 0 where none was ranked."""
        known = [s for s in (self._fastest_s, self._fastest_before_s) if s]
        return min(known) if known else 0.0

    def _refuse(
        self, requests: Sequence[RankRequest], now_s: float, whole: bool, by_user: bool
    ) -> dict[int, Refusal]:
        size = len(requests)
        latest_s = now_s + self.fastest_s
        in_time = all(r.deadline_s is None or r.deadline_s >= latest_s for r in requests)
        has_room = not self.limit.is_limiting and self.limit.in_flight + size <= self._ceiling
        if in_time and has_room and not self._any_rate:
            return {}
        tiers = np.minimum(np.fromiter((r.tier for r in requests), np.int64, size), len(self.tiers) - 1)
        priorities = np.fromiter((PRIORITY_CODES[r.priority] for r in requests), np.int64, size)
        levels = PRIORITIES * tiers + priorities
        order = np.argsort(-levels, kind="stable")
        tiers, levels = tiers[order], levels[order]
        reasons = np.full(size, -1, np.int64)
        if not in_time:
            deadlines = (np.inf if r.deadline_s is None else r.deadline_s for r in requests)
            reasons[np.fromiter(deadlines, np.float64, size)[order] < latest_s] = 0
        clients = self._clients if by_user else None
        if clients is not None:
            users = np.fromiter((r.user_id for r in requests), np.int64, size)[order]
            rate, burst = self.tiers.client_rate[tiers], self.tiers.client_burst[tiers]
            asked = np.flatnonzero((reasons < 0) & np.isfinite(rate))
            left = clients.tokens(users[asked], rate[asked], burst[asked], now_s)
            reasons[asked[places(users[asked]) + 1 > left + 1e-9]] = 1
        if self.leases.any_limit:
            asked = np.flatnonzero(reasons < 0)
            left = self.leases.tokens[tiers[asked]]
            reasons[asked[places(tiers[asked]) + 1 > left]] = 2
        asked = np.flatnonzero(reasons < 0)
        # Caps fall along the order, so who comes after one without room has none either.
        reasons[asked[self.limit.in_flight + np.arange(len(asked)) >= self.limit.caps[levels[asked]]]] = 3
        passed, shed = np.flatnonzero(reasons < 0), np.flatnonzero(reasons >= 0)
        if whole and len(shed):
            passed = passed[:0]
        if self.leases.any_limit:
            self.leases.take(np.bincount(tiers[passed], minlength=len(self.tiers)))
        if clients is not None:
            passed = passed[np.isfinite(rate[passed])]
            clients.take(users[passed], rate[passed], burst[passed], now_s)
        return {
            at: Refusal(_REASONS[reason], _ERRORS[reason])
            for at, reason in zip(order[shed].tolist(), reasons[shed].tolist(), strict=True)
        }
