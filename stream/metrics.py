"""Prometheus metrics of the worker. No user or item ids in labels."""

from __future__ import annotations

import contextlib

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

ARMS = ("serving", "canary", "shadow")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class StreamMetrics:
    """One set per worker; `registry` is what /metrics prints."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        r = self.registry
        self.clicks = Counter("tailrace_clicks", "Clicks accepted", registry=r)
        self.requests = Counter("tailrace_requests", "Requests accepted", registry=r)
        self.lists = Counter("tailrace_lists", "Ranked lists delivered", ["degraded"], registry=r)
        self.dead_letters = Counter("tailrace_dead_letters", "Records refused", ["reason"], registry=r)
        self.click_to_result_s = Histogram(
            "tailrace_click_to_result_seconds",
            "From the click's record timestamp to its list acknowledged by the broker",
            buckets=_SECONDS,
            registry=r,
        )
        self.store_s = Histogram(
            "tailrace_store_seconds", "Appending one unit to sequences", buckets=_SECONDS, registry=r
        )
        self.rank_s = Histogram(
            "tailrace_rank_seconds", "Ranking one unit, waiting included", buckets=_SECONDS, registry=r
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
        self.model = Gauge("tailrace_model_info", "The serving model", ["version", "engine"], registry=r)
        self.release_lists = Counter(
            "tailrace_release_lists",
            "Lists ranked by a version that is open",
            ["version", "arm"],
            registry=r,
        )
        self.release_failures = Counter(
            "tailrace_release_failures",
            "Requests that a version which is open did not answer",
            ["version", "arm"],
            registry=r,
        )
        self.releases_refused = Counter(
            "tailrace_releases_refused",
            "Versions that could not be taken as what they were released as",
            ["stage"],
            registry=r,
        )
        self.shadow = Counter(
            "tailrace_shadow_requests", "Sampled requests by what came of them", ["outcome"], registry=r
        )
        self.shadow_overlap = Gauge(
            "tailrace_shadow_overlap", "Share of items that shadow and sent lists have in common", registry=r
        )
        self.shadow_s = Histogram(
            "tailrace_shadow_seconds",
            "One batch of the shadow, waiting included",
            buckets=_SECONDS,
            registry=r,
        )

    def forget_version(self, version: str) -> None:
        """Drop the counts of a version that is no longer open: versions come and go without end."""
        for counter in (self.release_lists, self.release_failures):
            for arm in ARMS:
                with contextlib.suppress(KeyError):
                    counter.remove(version, arm)
