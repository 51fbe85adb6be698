"""Retraining whenever a cron expression says so, one run at a time, each in a process of its own.

A child that is killed is taken up again, from its step; one that another process's lease keeps out waits for
the next time. SIGTERM is passed on: the child keeps what it has, and the service ends. The run that was left
is the first thing the next service does.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson
import prometheus_client as prometheus
from aiohttp import web
from croniter import croniter

from compression.retraining.runs import PROGRESS, Run, RunInvalid, new_name, runs
from infra.retraining import HELD, REFUSED, STOPPED

ATTEMPTS: Final = 3
STALL_S: Final = 1_800.0
_PAUSE_S: Final = 2.0
_SHOWN: Final = 20

log = logging.getLogger(__name__)


class ScheduleInvalid(ValueError):
    """Not a cron expression of five fields."""


class Cron:
    """When to begin: five fields, UTC."""

    def __init__(self, expression: str) -> None:
        if len(expression.split()) != 5 or not croniter.is_valid(expression):
            raise ScheduleInvalid(
                f"{expression!r} is no cron expression of five fields: '0 * * * *' is hourly"
            )
        self.expression = expression

    def next_s(self, after_s: float) -> float:
        """Unix seconds of the first time after `after_s`. Times that pass during a run are not made up."""
        return float(croniter(self.expression, after_s).get_next(float))


class _Metrics:
    """What /metrics says."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        told: dict[str, Any] = {"registry": self.registry}
        self.ended = prometheus.Counter("tailrace_retrain_runs_total", "Runs by outcome", ["outcome"], **told)
        self.running = prometheus.Gauge("tailrace_retrain_running", "1 while a run is at work", **told)
        self.next_s = prometheus.Gauge("tailrace_retrain_next_seconds", "Unix time of the next run", **told)
        self.published_s = prometheus.Gauge(
            "tailrace_retrain_last_published_seconds", "Unix time of the latest published version", **told
        )
        self.step_s = prometheus.Gauge("tailrace_retrain_step_seconds", "Of the latest run", ["step"], **told)


class Service:
    """The schedule at work. `command` is one run's command line without its name."""

    def __init__(self, cron: Cron, command: Sequence[str], root: Path, alias: str) -> None:
        self._cron, self._command, self._root, self._alias = cron, list(command), root, alias
        self._child: asyncio.subprocess.Process | None = None
        self._current: str | None = None
        self._ending = asyncio.Event()
        self._next_s = 0.0
        self._moved_s = time.time()
        self._metrics = _Metrics()
        self._ended: Counter[str] = Counter()
        self.port = 0

    async def run(self, host: str, port: int) -> int:
        """Until SIGTERM or SIGINT; then 0."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        runner = await self._listen(host, port)
        told = (self._alias, self._cron.expression, host, self.port)
        log.info("retraining %s at %r (UTC), probes at http://%s:%d", *told)
        try:
            if self._left_over():
                await self._work()
            while not self._ending.is_set():
                self._next_s = self._cron.next_s(time.time())
                self._metrics.next_s.set(self._next_s)
                log.info("next run at %s", datetime.fromtimestamp(self._next_s, UTC).isoformat())
                if await self._sleep(self._next_s - time.time()):
                    break
                await self._work()
        finally:
            await runner.cleanup()
        log.info("ended")
        return 0

    async def _work(self) -> None:
        """One run to its end, one that was left before a new one; what kills it costs an attempt."""
        name = self._left_over() or new_name()
        for attempt in range(1, ATTEMPTS + 1):
            code = await self._attempt(name)
            outcome = {0: "published", REFUSED: "refused", HELD: "held", STOPPED: "stopped"}.get(code)
            if outcome is not None or code > 0 or self._ending.is_set():
                break
            log.warning("run %s was killed by signal %d (attempt %d of %d)", name, -code, attempt, ATTEMPTS)
            if await self._sleep(_PAUSE_S * attempt):
                break
        outcome = outcome or ("failed" if code > 0 else "killed")
        if outcome == "killed" and not self._ending.is_set():
            self._give_up(name)
        self._ended[outcome] += 1
        self._metrics.ended.labels(outcome).inc()
        log.info("run %s: %s", name, outcome)
        self._note(name, outcome)

    async def _attempt(self, name: str) -> int:
        self._current, self._moved_s = name, time.time()
        self._metrics.running.set(1)
        try:
            self._child = await asyncio.create_subprocess_exec(
                *self._command, "--run", name, stdout=asyncio.subprocess.DEVNULL
            )
            if self._ending.is_set():
                self._child.terminate()
            return await self._child.wait()
        finally:
            self._child, self._current = None, None
            self._metrics.running.set(0)

    def _give_up(self, name: str) -> None:
        """What dies every time must not be what every next time begins with."""
        try:
            with Run.find(self._root, name) as run:
                run.end("failed", f"killed {ATTEMPTS} times")
        except RunInvalid as error:
            log.warning("%s", error)

    def _note(self, name: str, outcome: str) -> None:
        try:
            state = Run.find(self._root, name).state
        except RunInvalid:
            return
        for step, done in state.steps.items():
            self._metrics.step_s.labels(step).set(done.seconds)
        if outcome == "published":
            self._metrics.published_s.set(time.time())

    def _left_over(self) -> str | None:
        """The latest run of the alias that somebody began and nobody ended."""
        for run in reversed(runs(self._root)):
            if run.state.spec.get("alias") in (self._alias, None):
                return run.state.run if run.state.outcome == "running" else None
        return None

    def _end(self) -> None:
        self._ending.set()
        if self._child is not None and self._child.returncode is None:
            self._child.terminate()

    async def _sleep(self, seconds: float) -> bool:
        """Whether the service is to end before the time is over."""
        try:
            await asyncio.wait_for(self._ending.wait(), max(0.0, seconds))
        except TimeoutError:
            return False
        return True

    def ended(self, outcome: str) -> int:
        """How many runs of this service ended so."""
        return self._ended[outcome]

    # Probes ----------------------------------------------------------------------------------------

    def _progress(self) -> dict[str, Any]:
        """The step at work and how far it is; empty while none is."""
        if self._current is None:
            return {}
        path = self._root / self._current / PROGRESS
        try:
            told: dict[str, Any] = orjson.loads(path.read_bytes())
        except (FileNotFoundError, orjson.JSONDecodeError):
            return {"run": self._current}
        self._moved_s = max(self._moved_s, float(told["at"]))
        return {"run": self._current, **told}

    def health(self) -> dict[str, Any]:
        """Healthy is a service that waits for its time, or whose run gets on."""
        progress = self._progress()
        stalled_s = time.time() - self._moved_s if progress else 0.0
        return {
            "healthy": stalled_s < STALL_S,
            "schedule": self._cron.expression,
            "next": datetime.fromtimestamp(self._next_s, UTC).isoformat(timespec="seconds"),
            "stalled_s": round(stalled_s, 1),
            "running": progress or None,
        }

    async def _listen(self, host: str, port: int) -> web.AppRunner:
        async def healthz(_: web.Request) -> web.Response:
            body = self.health()
            return web.json_response(body, status=200 if body["healthy"] else 503)

        async def metrics(_: web.Request) -> web.Response:
            text = prometheus.generate_latest(self._metrics.registry)
            return web.Response(body=text, headers={"Content-Type": prometheus.CONTENT_TYPE_LATEST})

        async def listed(_: web.Request) -> web.Response:
            found = runs(self._root)[-_SHOWN:]
            return web.json_response(
                {"runs": [run.state.model_dump(include=_FIELDS) for run in reversed(found)]}
            )

        app = web.Application(client_max_size=64 * 1024)
        app.add_routes([web.get("/healthz", healthz), web.get("/metrics", metrics), web.get("/runs", listed)])
        runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        await web.TCPSite(runner, host, port).start()
        self.port = int(runner.addresses[0][1])
        return runner


_FIELDS: Final = {"run", "version", "created_at", "outcome", "detail", "attempts"}
