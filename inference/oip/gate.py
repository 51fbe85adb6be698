"""Who is let in to be ranked by the server: tiers and admission, as the stream has them.

A request of several users is let in as a whole or refused as a whole. What knows of no user (graphs, and
lists without `user_ids`) is of the default tier. A rate that is used up is RESOURCE_EXHAUSTED (429), no
room is UNAVAILABLE (503), and both say when to come again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge

from inference.admission.control import Admission, Refusal, Ticket
from inference.admission.settings import AdmissionSettings
from inference.admission.users import UserTiers
from inference.errors import InferenceError, NoRoom, Overloaded
from inference.oip.list_model import Rank
from inference.oip.models import Question
from inference.types import RankedList, RankRequest, Tensors

# Left unset, lists wait for an engine for so long before fewer are let in.
QUEUE_TARGET_MS: Final = 500.0

Run = Callable[[Question], Awaitable[Tensors]]
Outcomes = Sequence[RankedList | InferenceError]


class GateMetrics:
    """What the gate reports to Prometheus."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.shed = Counter(
            "tailrace_serve_shed", "Lists that were not let in", ["reason", "tier"], registry=registry
        )
        self.lists_limit = Gauge(
            "tailrace_serve_lists_limit", "Lists in hand below the top tier, at most", registry=registry
        )
        self.loop_lag_s = Gauge(
            "tailrace_serve_loop_lag_seconds", "How late the event loop ran a timer", registry=registry
        )


class Gate:
    """In front of everything that computes lists or graphs."""

    def __init__(self, admission: Admission, users: UserTiers, metrics: GateMetrics) -> None:
        self._admission = admission
        self._users = users
        self._metrics = metrics
        tiers = admission.tiers
        self._default = tiers.default
        self._of_nobody = RankRequest(0, None, tier=tiers.default)
        rates = [(tier.rate, tier.client_rate) for tier in tiers.tiers]
        lease_s = admission.leases.lease_s
        self._tier_s = [max(lease_s, 1 / rate) if rate else lease_s for rate, _ in rates]
        self._client_s = [1 / rate if rate else lease_s for _, rate in rates]

    def lists(self, rank: Rank) -> Rank:
        """The same, for those who are let in."""

        async def gated(requests: Sequence[RankRequest], known: bool) -> Outcomes:
            requests = await self._tiered(requests, known)
            ticket = self._admit(requests, known)
            outcomes: Outcomes = ()
            try:
                outcomes = await rank(requests, known)
                return outcomes
            finally:
                self._finish(ticket, outcomes)

        return gated

    def graph(self, run: Run) -> Run:
        """Likewise. Each user of a question counts as a list."""

        async def gated(question: Question) -> Tensors:
            request = self._of_nobody
            if question.deadline_s is not None or question.priority != request.priority:
                request = replace(request, priority=question.priority, deadline_s=question.deadline_s)
            count = len(next(iter(question.inputs.values())))
            ticket = self._admit([request] * count, False)
            outcomes: Outcomes = ()
            try:
                return await run(question)
            except InferenceError as error:
                outcomes = [error] * count
                raise
            finally:
                self._finish(ticket, outcomes)

        return gated

    async def _tiered(self, requests: Sequence[RankRequest], known: bool) -> Sequence[RankRequest]:
        if known and self._users.any_known:
            codes = await self._users.codes([request.user_id for request in requests])
        else:
            codes = [self._default] * len(requests)
        for request, code in zip(requests, codes, strict=True):
            if request.tier != code:
                break
        else:
            return requests
        return [replace(request, tier=code) for request, code in zip(requests, codes, strict=True)]

    def _admit(self, requests: Sequence[RankRequest], known: bool) -> Ticket:
        now_s = asyncio.get_running_loop().time()
        ticket = self._admission.admit(requests, now_s, whole=True, by_user=known)
        if ticket.refused:
            at, refusal = next(iter(ticket.refused.items()))
            tier = requests[at].tier
            shed = self._metrics.shed.labels(reason=refusal.reason, tier=self._admission.tiers.names[tier])
            shed.inc(len(requests))
            raise self._error(refusal, tier)
        return ticket

    def _finish(self, ticket: Ticket, outcomes: Outcomes) -> None:
        now_s = asyncio.get_running_loop().time()
        for group in ticket.groups:
            if outcomes and len(group.requests) < len(outcomes):
                of_group = [outcomes[at] for at in group.positions]
            else:
                of_group = list(outcomes)
            self._admission.finish(group, now_s, of_group)

    def _error(self, refusal: Refusal, tier: int) -> InferenceError:
        words = str(refusal.error)
        match refusal.reason:
            case "client-rate":
                return Overloaded(words, retry_after_s=self._client_s[tier])
            case "tier-rate":
                return Overloaded(words, retry_after_s=self._tier_s[tier])
            case "concurrency":
                return NoRoom(words, retry_after_s=self._admission.queue_target_s)
            case "deadline":
                return refusal.error


def admission_of(settings: AdmissionSettings, max_queue: int, redis_url: str | None) -> Admission:
    """The admission control of a server: what is left unset follows from its own bounds."""
    return Admission.of(settings, ceiling=max_queue, queue_target_ms=QUEUE_TARGET_MS, redis_url=redis_url)
