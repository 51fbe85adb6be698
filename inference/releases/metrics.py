"""What releases report to Prometheus. No user or item ids in labels."""

from __future__ import annotations

import contextlib
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

ARMS: Final = ("serving", "canary", "shadow")
SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class ReleaseMetrics:
    """One set per process that serves, in the registry that its /metrics prints."""

    def __init__(self, registry: CollectorRegistry) -> None:
        r = registry
        self.model = Gauge("tailrace_model_info", "The serving model", ["version", "engine"], registry=r)
        self.lists = Counter(
            "tailrace_release_lists",
            "Lists ranked by a version that is open",
            ["version", "arm"],
            registry=r,
        )
        self.failures = Counter(
            "tailrace_release_failures",
            "Requests that a version which is open did not answer",
            ["version", "arm"],
            registry=r,
        )
        self.refused = Counter(
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
            buckets=SECONDS,
            registry=r,
        )

    def serves(self, version: str, engine: str) -> None:
        """This is the version that serves from now on."""
        self.model.clear()
        self.model.labels(version=version, engine=engine).set(1)

    def forget_version(self, version: str) -> None:
        """Drop the counts of a version that is no longer open: versions come and go without end."""
        for counter in (self.lists, self.failures):
            for arm in ARMS:
                with contextlib.suppress(KeyError):
                    counter.remove(version, arm)
