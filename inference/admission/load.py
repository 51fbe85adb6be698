"""How busy this process and its machine are: event-loop lag and CPU, told to the admission control."""

from __future__ import annotations

import asyncio
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

import psutil
from prometheus_client import Gauge

from inference.admission.control import Admission

INTERVAL_S: Final = 0.05
CPU_INTERVAL_S: Final = 0.5
_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")


def processors(quota: Path = _QUOTA) -> int:
    """How many processors this process may use: those it may run on, or its container's limit (cgroup v2)
    where that is less, begun ones counted whole."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # No such file: no limit. The word `max`, which is no number: none either.
    with suppress(OSError, ValueError):
        most_us, period_us = quota.read_text().split()
        count = min(count, max(1, math.ceil(int(most_us) / int(period_us))))
    return count


class LoadGauges(Protocol):
    """Where what was measured is shown."""

    @property
    def loop_lag_s(self) -> Gauge: ...
    @property
    def lists_limit(self) -> Gauge: ...


class LoadProbe:
    """A timer that says how late it was. Two dozen microseconds a tick, CPU read every tenth."""

    def __init__(self, admission: Admission, metrics: LoadGauges) -> None:
        self._admission = admission
        self._metrics = metrics
        self._process = psutil.Process()
        self._cores = processors()
        self._cpu = 0.0
        self._cpu_read_s = 0.0

    async def run(self) -> None:
        """Measure as long as the process lives."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + INTERVAL_S
            await asyncio.sleep(INTERVAL_S)
            self.tick(loop.time(), due_s)

    def tick(self, now_s: float, due_s: float) -> None:
        lag_s = max(0.0, now_s - due_s)
        if now_s - self._cpu_read_s >= CPU_INTERVAL_S:
            self._cpu, self._cpu_read_s = self._read_cpu(), now_s
        self._admission.update(now_s, lag_s=lag_s, cpu=self._cpu)
        self._metrics.loop_lag_s.set(lag_s)
        self._metrics.lists_limit.set(self._admission.limit.limit)

    def _read_cpu(self) -> float:
        """The share in use, of the machine's processors or of those this process may run on."""
        try:
            ours = float(self._process.cpu_percent()) / self._cores
            return min(1.0, max(ours, float(psutil.cpu_percent())) / 100)
        except (psutil.Error, OSError):
            # A sandbox without /proc: the queue and the lag tell enough.
            return 0.0
