"""Fault scenarios on real parts: kill -9, broker and Redis outages, malformed messages.

Each sends clicks open-loop, breaks something at moments drawn from the seed, waits until the lists
are in, and accounts for every click: lost, duplicated under the same or another id, and whether the
sequences in Redis are those that the log gives.
"""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infra.bench import report
from infra.bench.load import Account, Collecting, Record, poisson, records, send
from infra.bench.oracle import differing_users, expected_sequences
from infra.bench.rig import Rig
from infra.clients import everything, reader
from infra.local.worker import spawn
from topics.messages import BehaviorEvent

QUIET_S = 30.0
# Longer than a restart and than the control's longest step: no list comes later. Where the clicks are all
# committed none comes at all, but for what the collector is reading.
SETTLE_S = 15.0
COLLECTED_S = 1.0
STOCK = "stock Faust, kill -9"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the clicks of one scenario."""

    scenario: str
    clicks: int
    lost: int
    duplicated: int
    other_ids: int
    degraded: int
    wrong_sequences: int | None
    worker_starts: int
    seconds: float
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def kept_its_promise(self) -> bool:
        return not (self.lost or self.other_ids or self.wrong_sequences)


def kills(
    parts: Rig, events: Sequence[BehaviorEvent], *, duration_s: float, kills: int, seed: int
) -> Outcome:
    """SIGKILL the worker at random moments of a replay, ready or not; it is started again at once."""
    worker = parts.worker().start()

    def kill() -> None:
        worker.kill()
        worker.launch()

    try:
        return _scenario("kill -9", parts, events, duration_s, _moments(seed, kills, duration_s), kill)
    finally:
        worker.stop()


def control(
    parts: Rig, events: Sequence[BehaviorEvent], *, duration_s: float, kills: int, seed: int
) -> Outcome:
    """The same on stock Faust with concurrency 2, which loses what was in flight (issue 606)."""
    with _StockFaust(parts) as stock:
        moments, fault = _moments(seed, kills, duration_s), stock.kill_and_start
        return _scenario(STOCK, parts, events, duration_s, moments, fault)


def outage(
    parts: Rig, events: Sequence[BehaviorEvent], *, duration_s: float, what: str, outage_s: float, at_s: float
) -> Outcome:
    """Stop the broker or Redis for `outage_s` and start it again; the worker is left alone."""
    server = parts.kafka if what == "kafka" else parts.redis

    def stop_and_start() -> None:
        server.stop()
        time.sleep(outage_s)
        server.start()

    with parts.worker() as worker:
        pid = worker.pid
        name = f"{what} away {outage_s:g} s"
        outcome = _scenario(name, parts, events, duration_s, [at_s], stop_and_start)
        if worker.pid != pid:
            raise RuntimeError("the worker did not survive the outage")
        return outcome


def malformed(parts: Rig, good: Sequence[BehaviorEvent], *, bad: int, rate: float, seed: int) -> Outcome:
    """Good clicks with bad ones among them: a list or a dead letter for each, and no restart."""
    rng = random.Random(seed)
    mixed: list[Record] = list(records(good))
    broken = [rng.choice(BROKEN)(number) for number in range(bad)]
    for record in broken:
        mixed.insert(rng.randrange(len(mixed) + 1), record)
    with parts.worker() as worker:
        pid = worker.pid
        started_s = time.monotonic()
        bootstrap = parts.kafka.bootstrap
        with Collecting(bootstrap, parts.topics.recommendations, parts.folder) as collecting:
            send(bootstrap, parts.topics.clicks, mixed, poisson(len(mixed), rate, seed))
            collecting.wait(len(good), quiet_s=QUIET_S)
            account = Account.of(len(good), collecting.finish())
        reasons: dict[str, int] = {}
        consumer = reader(bootstrap, parts.topics.dead_letters)
        for letter in everything(consumer):
            reason = dict(letter.headers)["reason"].decode()
            reasons[reason] = reasons.get(reason, 0) + 1
        consumer.close()
        expected, _ = expected_sequences(bootstrap, parts.topics.clicks)
        return Outcome(
            scenario="malformed",
            clicks=len(good),
            lost=account.lost,
            duplicated=account.duplicated,
            other_ids=account.other_ids,
            degraded=account.degraded,
            wrong_sequences=len(differing_users(parts.redis.url, expected)),
            worker_starts=1 if worker.pid == pid else 2,
            seconds=round(time.monotonic() - started_s, 1),
            notes={
                "malformed": bad,
                "dead_letters": sum(reasons.values()),
                "reasons": reasons,
                "ranked_again": account.ranked_again,
                "assignments": int(worker.metric("tailrace_rebalances_total")),
            },
        )


def _scenario(
    name: str,
    parts: Rig,
    events: Sequence[BehaviorEvent],
    duration_s: float,
    moments: Sequence[float],
    fault: Callable[[], None],
) -> Outcome:
    prepared = records(events)
    rate = len(prepared) / duration_s
    bootstrap = parts.kafka.bootstrap
    started_s = time.monotonic()
    with Collecting(bootstrap, parts.topics.recommendations, parts.folder) as collecting:
        with _faults(moments, fault) as failures:
            send(bootstrap, parts.topics.clicks, prepared, poisson(len(prepared), rate, 1))
        if failures:
            raise failures[0]
        collecting.wait(len(prepared), quiet_s=QUIET_S)
        through = name != STOCK and _within(SETTLE_S, parts.is_through)
        collecting.wait(len(prepared), quiet_s=QUIET_S, settle_s=COLLECTED_S if through else SETTLE_S)
        account = Account.of(len(prepared), collecting.finish())
    wrong = None
    if name != STOCK:
        expected, accepted = expected_sequences(bootstrap, parts.topics.clicks)
        if accepted < len(prepared):
            raise RuntimeError(f"the log holds {accepted} of {len(prepared)} clicks: the generator lost some")
        wrong = len(differing_users(parts.redis.url, expected))
    return Outcome(
        scenario=name,
        clicks=len(prepared),
        lost=account.lost,
        duplicated=account.duplicated,
        other_ids=account.other_ids,
        degraded=account.degraded,
        wrong_sequences=wrong,
        worker_starts=1 + (len(moments) if "kill" in name else 0),
        seconds=round(time.monotonic() - started_s, 1),
        notes={"faults_at_s": [round(moment, 2) for moment in moments]},
    )


def _within(seconds: float, holds: Callable[[], bool]) -> bool:
    end_s = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.1)
    return True


@contextmanager
def _faults(moments: Sequence[float], fault: Callable[[], None]) -> Any:
    """Run `fault` at these seconds from now, in a thread; leaving waits for the last one."""
    failures: list[BaseException] = []

    def run() -> None:
        started_s = time.monotonic()
        for moment in moments:
            time.sleep(max(0.0, started_s + moment - time.monotonic()))
            try:
                fault()
            except Exception as error:  # noqa: BLE001  # handed to the caller, who raises it
                failures.append(error)
                return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield failures
    thread.join()


def _moments(seed: int, count: int, duration_s: float) -> list[float]:
    rng = random.Random(seed)
    return sorted(rng.uniform(1.0, duration_s) for _ in range(count))


class _StockFaust:
    """The control arm's process."""

    def __init__(self, parts: Rig) -> None:
        self._told = ("rank", parts.kafka.bootstrap, "stock", "2")
        self._folder = parts.folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _StockFaust:
        self._process = spawn("infra.bench.stock_faust", *self._told, folder=self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def kill_and_start(self) -> None:
        self.__exit__()
        self.__enter__()


def _broken(change: Callable[[dict[str, Any]], Any]) -> Callable[[int], Record]:
    """A click made wrong by `change`, which may return bytes to stand for the whole value."""
    import orjson

    def make(number: int) -> Record:
        body: dict[str, Any] = {
            "event_id": f"bad-{number}",
            "user_id": number,
            "item_id": 1,
            "category_id": 1,
            "behavior": "pv",
            "timestamp": 1_511_600_000,
        }
        made = change(body)
        return str(number).encode(), made if isinstance(made, bytes) else orjson.dumps(body)

    return make


BROKEN: tuple[Callable[[int], Record], ...] = (
    _broken(lambda body: b"{not json"),
    _broken(lambda body: b'{"event_id": "\xff\xfe"}'),
    _broken(lambda body: b"[" * 5_000),
    _broken(lambda body: b'{"pad": "' + b"x" * 100_000 + b'"}'),
    _broken(lambda body: body.pop("item_id")),
    _broken(lambda body: body.update(user_id="7")),
    _broken(lambda body: body.update(item_id=-1)),
    _broken(lambda body: body.update(behavior="stare")),
    _broken(lambda body: body.update(timestamp=1_511_600_000_000)),
    _broken(lambda body: body.update(timestamp=3_900_000_000)),
    _broken(lambda body: body.update(user_id=body["user_id"] + 1)),
    _broken(lambda body: body.update(event_id="")),
)


def show(outcomes: Sequence[Outcome], *, log: str, seed: int, json_path: Path | None) -> None:
    """The table, and the JSON where a path is given."""
    report.table(
        f"faults: {log}",
        ["scenario", "clicks", "lost", "dup", "other ids", "degraded", "wrong sequences", "starts", "s"],
        [
            [
                outcome.scenario,
                f"{outcome.clicks:,}",
                str(outcome.lost),
                str(outcome.duplicated),
                str(outcome.other_ids),
                str(outcome.degraded),
                "-" if outcome.wrong_sequences is None else str(outcome.wrong_sequences),
                str(outcome.worker_starts),
                f"{outcome.seconds:.0f}",
            ]
            for outcome in outcomes
        ],
    )
    for outcome in outcomes:
        if "reasons" in outcome.notes:
            listed = ", ".join(f"{name} {count}" for name, count in sorted(outcome.notes["reasons"].items()))
            report.note(f"{outcome.notes['dead_letters']} dead letters: {listed}")
    report.write(
        json_path,
        "faults",
        {"log": log, "seed": seed, "scenarios": [asdict(outcome) for outcome in outcomes]},
    )
