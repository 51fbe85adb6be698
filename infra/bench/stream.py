"""`tailrace bench stream`: click to ranked list through the real broker, Redis and worker."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hdrh.histogram import HdrHistogram

from infra.bench import report
from infra.bench.load import Account, Collected, Collecting, Sent, poisson, records, send
from infra.bench.rig import Rig, rig
from topics.catalog import CLICKS, RECOMMENDATIONS
from topics.messages import BehaviorEvent

WARM_UP_S = 10.0
QUIET_S = 20.0
PERCENTILES = (50.0, 95.0, 99.0, 99.9, 100.0)
VOID_BEHIND_MS = 5.0


@dataclass(frozen=True, slots=True)
class Result:
    """One run. Latencies are from the intended send time to the independent consumer, warm-up left out."""

    clicks: int
    lists: int
    lists_per_s: float
    latency_ms: dict[str, float]
    worker_cpu_s_per_1000: float
    worker_memory_mb: float
    lost: int
    duplicated: int
    other_ids: int
    degraded: int
    generator_behind_p99_ms: float
    model: str
    engine: str
    stages_ms: dict[str, float]


def run(
    events: Sequence[BehaviorEvent],
    *,
    registry: Path,
    rate: float,
    seed: int,
    options: Sequence[str] = (),
) -> Result:
    """One run on a rig of its own; `rate` 0 sends everything at once and measures the drain."""
    with rig(registry) as parts, parts.worker(options=options) as worker:
        ready = worker.readiness()
        before_s = worker.cpu_s()
        sent, collected = _drive(parts, events, rate, seed)
        cpu_s, memory_mb = worker.cpu_s() - before_s, worker.memory_mb()
    return _result(
        count=len(events),
        sent=sent,
        collected=collected,
        rate=rate,
        cpu_s=cpu_s,
        memory_mb=memory_mb,
        ready=ready,
    )


def _drive(parts: Rig, events: Sequence[BehaviorEvent], rate: float, seed: int) -> tuple[Sent, Collected]:
    prepared = records(events)
    bootstrap = parts.kafka.bootstrap
    with Collecting(bootstrap, RECOMMENDATIONS.name, parts.folder) as collecting:
        sent = send(bootstrap, CLICKS.name, prepared, poisson(len(prepared), rate, seed))
        collecting.wait(len(prepared), quiet_s=QUIET_S)
        return sent, collecting.finish()


def _result(
    count: int,
    sent: Sent,
    collected: Collected,
    rate: float,
    cpu_s: float,
    memory_mb: float,
    ready: dict[str, Any],
) -> Result:
    account = Account.of(count, collected)
    arrived = np.sort(account.first_s[~np.isnan(account.first_s)])
    # From the first to the last list, the slow start and end left out.
    low, high = int(0.02 * len(arrived)), max(1, int(0.98 * len(arrived)) - 1)
    span_s = arrived[high] - arrived[low] if len(arrived) > 2 else float("nan")
    latency_s = account.first_s - sent.intended_s
    warm = sent.intended_s >= sent.intended_s[0] + (WARM_UP_S if rate else 0.0)
    return Result(
        clicks=count,
        lists=account.lists,
        lists_per_s=round((high - low) / span_s, 1),
        latency_ms=percentiles(latency_s[warm & ~np.isnan(latency_s)]),
        worker_cpu_s_per_1000=round(cpu_s / count * 1000, 3),
        worker_memory_mb=round(memory_mb, 1),
        lost=account.lost,
        duplicated=account.duplicated,
        other_ids=account.other_ids,
        degraded=account.degraded,
        generator_behind_p99_ms=round(sent.behind_p99_ms, 3),
        model=str(ready.get("model")),
        engine=str(ready.get("engine")),
        stages_ms={
            "wait": round(float(collected.wait_ms.mean()), 3),
            "rank_batch": round(float(collected.rank_ms.mean()), 3),
        },
    )


def percentiles(latency_s: Any) -> dict[str, float]:
    """p50 … max in milliseconds, through an HdrHistogram of microseconds (three digits)."""
    histogram = HdrHistogram(1, 3_600_000_000, 3)
    for value in np.maximum(1, latency_s * 1e6).astype(np.int64).tolist():
        histogram.record_value(value)
    names = ("p50", "p95", "p99", "p99.9", "max")
    return {
        name: round(histogram.get_value_at_percentile(percentile) / 1000, 2)
        for name, percentile in zip(names, PERCENTILES, strict=True)
    }


def show(results: Sequence[Result], *, rate: float, log: str, seed: int, json_path: Path | None) -> None:
    """The table, and the JSON where a path is given."""
    asked = f"{rate:g} clicks/s" if rate else "as fast as it can"
    report.table(
        f"stream: {log}, {asked}, {results[0].engine}, model {results[0].model}",
        ["run", "lists/s", "p50", "p95", "p99", "p99.9", "max ms", "CPU s/1k", "lost", "dup", "degraded"],
        [
            [
                str(number),
                f"{result.lists_per_s:,.0f}",
                *(f"{value:,.1f}" for value in result.latency_ms.values()),
                f"{result.worker_cpu_s_per_1000:.3f}",
                str(result.lost),
                str(result.duplicated),
                str(result.degraded),
            ]
            for number, result in enumerate(results, 1)
        ],
    )
    for result in results:
        if rate and result.generator_behind_p99_ms > VOID_BEHIND_MS:
            behind = result.generator_behind_p99_ms
            report.note(
                f"The generator ran {behind:.1f} ms behind at p99: this machine was too busy to tell."
            )
    report.write(
        json_path,
        "stream",
        {
            "log": log,
            "rate": rate,
            "seed": seed,
            "taken_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "runs": [asdict(result) for result in results],
        },
    )
