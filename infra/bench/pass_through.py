"""`tailrace bench pass-through`: what the framework costs, against stock Faust, interleaved.

Both decode the click, make the same small list, and send it to the recommendations topic; neither
ranks nor touches Redis. The log is there before either starts, so what is measured is the drain.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil

from infra.bench import report
from infra.bench.load import Record, poisson, send
from infra.bench.rig import Rig, rig
from infra.clients import reader
from infra.local.paths import registry_dir
from infra.local.worker import spawn
from topics.catalog import CLICKS, RECOMMENDATIONS
from topics.messages import BehaviorEvent

LIST_HEADERS = [("tailrace-schema", b"1")]
QUIET_S = 30.0


def list_value(click: BehaviorEvent, record: Any) -> bytes:
    """A list of one item: the clicked one."""
    return orjson.dumps(
        {
            "recommendation_id": f"{CLICKS.name}-{record.partition}-{record.offset}",
            "user_id": click.user_id,
            "trigger": {"kind": "click", "clicks": [{"event_id": click.event_id, "item_id": click.item_id}]},
            "items": [{"item_id": click.item_id, "score": 1.0, "source": "recent"}],
        }
    )


def run_app(app: Any) -> None:
    """Run an arm's Faust app until SIGTERM, both arms alike."""
    import faust
    import uvloop

    # override_logging=False: Faust's own set-up turns on every library's debug records for its spinner.
    faust.Worker(
        app,
        loop=uvloop.new_event_loop(),
        loglevel="WARNING",
        quiet=True,
        redirect_stdouts=False,
        blocking_timeout=0.0,
        override_logging=False,
    ).execute_from_commandline()


@dataclass(frozen=True, slots=True)
class Drain:
    """One arm's drain of the prepared log."""

    arm: str
    clicks_per_s: float
    cpu_us_per_click: float
    lists: int


def run(clicks: Sequence[Record], *, rounds: int) -> list[Drain]:
    """Ours, stock, ours, stock … each under a group of its own on the same log."""
    drains: list[Drain] = []
    with rig(registry_dir()) as parts:
        send(parts.kafka.bootstrap, CLICKS.name, clicks, poisson(len(clicks), 0, 1))
        for number in range(rounds):
            for arm in ("tailrace", "stock faust"):
                drains.append(_drain(parts, arm, f"{arm.split()[0]}-{number}", len(clicks)))
    return drains


def _drain(parts: Rig, arm: str, group: str, expected: int) -> Drain:
    bootstrap = parts.kafka.bootstrap
    consumer = reader(bootstrap, RECOMMENDATIONS.name)
    partitions = list(consumer.assignment())
    start = sum(consumer.end_offsets(partitions).values())
    module = (
        ["infra.bench.our_faust", bootstrap, group]
        if arm == "tailrace"
        else ["infra.bench.stock_faust", "pass-through", bootstrap, group, "1"]
    )
    process = spawn(*module, folder=parts.folder)
    watched = psutil.Process(process.pid)
    first_s = last_s = time.monotonic()
    first_count = count = 0
    first_cpu_s = cpu_s = 0.0
    try:
        while count < expected and time.monotonic() - last_s < QUIET_S:
            time.sleep(0.02)
            ends = sum(consumer.end_offsets(partitions).values()) - start
            if ends == count:
                continue
            times = watched.cpu_times()
            cpu_s, last_s, count = times.user + times.system, time.monotonic(), ends
            if not first_count:
                # The clock starts at the first list: start-up and joining the group are not the path.
                first_s, first_count, first_cpu_s = last_s, count, cpu_s
    finally:
        process.terminate()
        process.wait(30)
        consumer.close()
    if count < expected:
        raise RuntimeError(f"{arm} answered {count} of {expected} clicks, then nothing for {QUIET_S:.0f} s")
    counted = max(1, count - first_count)
    return Drain(
        arm=arm,
        clicks_per_s=round(counted / max(1e-9, last_s - first_s), 1),
        cpu_us_per_click=round((cpu_s - first_cpu_s) / counted * 1e6, 2),
        lists=count,
    )


def show(drains: Sequence[Drain], *, clicks: int, json_path: Path | None) -> float:
    """The table and the ratio of medians, round by round."""
    by_arm = {arm: [d for d in drains if d.arm == arm] for arm in ("tailrace", "stock faust")}
    ratios = [
        ours.clicks_per_s / stock.clicks_per_s
        for ours, stock in zip(by_arm["tailrace"], by_arm["stock faust"], strict=True)
    ]
    report.table(
        f"pass-through: {clicks:,} clicks, decoded and answered without ranking, interleaved",
        ["arm", "clicks/s (median)", "min", "max", "CPU µs/click", "lists"],
        [
            [
                arm,
                f"{statistics.median(d.clicks_per_s for d in rows):,.0f}",
                f"{min(d.clicks_per_s for d in rows):,.0f}",
                f"{max(d.clicks_per_s for d in rows):,.0f}",
                f"{statistics.median(d.cpu_us_per_click for d in rows):.1f}",
                f"{sum(d.lists for d in rows):,}",
            ]
            for arm, rows in by_arm.items()
        ],
    )
    ratio = statistics.median(ratios)
    report.note(f"ratio by round: {', '.join(f'{r:.1f}' for r in ratios)}; median {ratio:.1f}")
    report.write(
        json_path, "pass-through", {"clicks": clicks, "ratio": ratio, "rounds": [asdict(d) for d in drains]}
    )
    return ratio
