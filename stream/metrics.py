"""Prometheus metrics of the worker. No user or item ids in labels."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from inference.releases.metrics import SECONDS, ReleaseMetrics


class Observations(Histogram):
    """A histogram that takes many values at once, at a fifth of what `observe` takes for each."""

    def observe_all(self, values: Sequence[float]) -> None:
        if not values:
            return
        self._sum.inc(sum(values))
        counts = [0] * len(self._upper_bounds)
        for value in values:
            counts[bisect_left(self._upper_bounds, value)] += 1
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)


class StreamMetrics:
    """One set per worker; `registry` is what /metrics prints."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        r = self.registry
        self.clicks = Counter("tailrace_clicks", "Clicks accepted", registry=r)
        self.requests = Counter("tailrace_requests", "Requests accepted", registry=r)
        self.lists = Counter("tailrace_lists", "Ranked lists delivered", ["degraded"], registry=r)
        self.dead_letters = Counter("tailrace_dead_letters", "Records refused", ["reason"], registry=r)
        self.click_to_result_s = Observations(
            "tailrace_click_to_result_seconds",
            "From the click's record timestamp to its list acknowledged by the broker",
            buckets=SECONDS,
            registry=r,
        )
        self.store_s = Histogram(
            "tailrace_store_seconds", "Appending one unit to sequences", buckets=SECONDS, registry=r
        )
        self.rank_s = Histogram(
            "tailrace_rank_seconds", "Ranking one unit, waiting included", buckets=SECONDS, registry=r
        )
        self.shed = Counter(
            "tailrace_stream_shed",
            "Lists not ranked, or not in time, and answered degraded",
            ["reason", "tier"],
            registry=r,
        )
        self.lists_limit = Gauge(
            "tailrace_stream_lists_limit", "Lists that may be ranked at once, below the top tier", registry=r
        )
        self.loop_lag_s = Gauge(
            "tailrace_stream_loop_lag_seconds", "How late the event loop ran a timer", registry=r
        )
        self.store_failures = Counter(
            "tailrace_store_failures", "Appends that Redis did not take", registry=r
        )
        self.unanswered_units = Counter(
            "tailrace_unanswered_units", "Units that failed unexpectedly and will be read again", registry=r
        )
        self.in_flight = Gauge("tailrace_in_flight", "Records in hand", registry=r)
        self.lag = Gauge("tailrace_lag", "Records waiting in Kafka", ["topic", "partition"], registry=r)
        self.rebalances = Counter("tailrace_rebalances", "Assignments received", registry=r)
        self.releases = ReleaseMetrics(r)
