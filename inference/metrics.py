"""What the batcher and the ranker report to Prometheus. Plain counts live beside the objects."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

from prometheus_client import Counter, Gauge, Histogram

_SECONDS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

QUEUE_ITEMS: Final = Gauge("tailrace_inference_queue_items", "Items waiting for a runner")
BATCH_ITEMS: Final = Histogram(
    "tailrace_inference_batch_items", "Items per batch run", buckets=(1, 2, 4, 8, 16, 32, 64, 128)
)
WAIT_SECONDS: Final = Histogram(
    "tailrace_inference_wait_seconds", "How long the oldest item of a batch waited", buckets=_SECONDS
)
RUN_SECONDS: Final = Histogram(
    "tailrace_inference_run_seconds",
    "How long a batch ran, hand-over to the thread included",
    buckets=_SECONDS,
)
REFUSED: Final = Counter("tailrace_inference_refused", "Items refused because the queue was full")
EXPIRED: Final = Counter("tailrace_inference_expired", "Items whose deadline passed before their answer")
FAILED: Final = Counter("tailrace_inference_failed", "Items answered with an engine's failure")
LANE_UP: Final = Gauge("tailrace_inference_lane_up", "Whether a lane takes batches", ["lane"])
LANE_FAILURES: Final = Counter(
    "tailrace_inference_lane_failures", "Batches a lane failed at or hung on", ["lane"]
)
STAGE_SECONDS: Final = Histogram(
    "tailrace_inference_stage_seconds", "Time of one stage of ranking, per batch", ["stage"], buckets=_SECONDS
)

CACHE_USERS: Final = Counter(
    "tailrace_inference_cache", "Histories that were known, appended to, or encoded whole", ["outcome"]
)


@functools.cache
def cache_users(outcome: str) -> Counter:
    """The counter of one outcome: hit, append or miss."""
    return CACHE_USERS.labels(outcome)


@functools.cache
def stage_seconds(stage: str) -> Histogram:
    """The histogram of one stage; `labels` alone costs as much as the observation."""
    return STAGE_SECONDS.labels(stage)


@dataclass(slots=True)
class BatcherCounts:
    """What one batcher has done since it was made. items = answered + refused + expired + failed
    once nothing is queued or running."""

    items: int = 0
    batches: int = 0
    answered: int = 0
    refused: int = 0
    expired: int = 0
    failed: int = 0
    cancelled: int = 0
    retried_batches: int = 0
    largest_batch: int = 0
