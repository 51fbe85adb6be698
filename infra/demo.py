"""`make demo`: the whole path in a few minutes, on real parts, for a person to watch.

A broker, a Redis and a worker start; clicks of a log go in while there is no model (what is popular
comes out); a model is trained on the clicks that the topic holds by then and released into the running
worker; clicks go on, now ranked, and are found in the lists more often; one user's list is shown before and
after each of three clicks. Ends with an account of every click.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from compression.logs.log_reader import LogInvalid, iter_events
from infra.bench.load import Account, Collecting, Sent, poisson, records, send
from infra.bench.stream import percentiles
from infra.clients import partition_of, reader, to_the_end
from infra.ending import tidy_on_sigterm
from infra.local.kafka import LocalKafka
from infra.local.paths import local_dir
from infra.local.redis import LocalRedis
from infra.local.worker import LocalWorker
from infra.online import OnlineHits, lists_since, online_hits
from topics.admin import ensure_topics
from topics.catalog import CLICKS, RECOMMENDATIONS
from topics.codec import decode_recommendation, record_key
from topics.messages import BehaviorEvent, Recommendation

MOST_EVENTS = 1_000_000
COLD_CLICKS = 40_000
COLD_RATE = 1_000.0
WARM_UP_CLICKS = 400
MEASURED_CLICKS = 5_000
RATE = 200.0
K = 50
SHOWN = 8
SYNTHETIC = ["--events", "60000", "--users", "2000", "--items", "2000", "--categories", "40", "--seed", "7"]

console = Console(width=100)


@click.command()
@click.option(
    "--log",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A Taobao-format log; a synthetic one otherwise.",
)
@click.option(
    "--max-minutes", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Of training."
)
def demo(log: Path | None, max_minutes: float) -> None:
    """Clicks in, ranked lists out, a model trained and released in between; ends 0 if none was lost."""
    tidy_on_sigterm()
    started_s = time.monotonic()
    folder = local_dir().parent / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if log is None:
        log = folder / "clicks.csv"
        _step("A synthetic log in Taobao's format (yours: make demo LOG=clicks.csv)")
        _tailrace("synth", str(log), *SYNTHETIC)
    try:
        events = sorted(islice(iter_events(log), MOST_EVENTS), key=lambda event: event.timestamp)
    except LogInvalid as error:
        raise click.ClickException(str(error)) from error
    _step("A Kafka broker, a Redis and a worker that has no model yet")
    with (
        LocalRedis(folder / "redis") as redis,
        LocalKafka(folder / "kafka") as kafka,
        LocalWorker(
            folder / "worker",
            bootstrap=_with_topics(kafka.bootstrap),
            redis_url=redis.url,
            registry=folder / "models",
            instance_id="demo",
            options=("--log-level", "WARNING", "--k", str(K)),
        ) as worker,
        Collecting(kafka.bootstrap, RECOMMENDATIONS.name, folder) as collecting,
    ):
        console.print(f"kafka {kafka.bootstrap}   redis {redis.url}   probes http://{worker.address}/readyz")
        story = _Story(kafka.bootstrap, collecting)
        _play(story, events, folder, redis.url, max_minutes, worker)
        account = Account.of(story.sent, collecting.finish())
        sent = story.intended_s()
    _summary(account, sent, story, time.monotonic() - started_s)
    _what_next(folder)
    if account.lost or account.other_ids:
        raise click.ClickException("clicks were lost: this should not happen, please report it")


class _Story:
    """Clicks sent so far, numbered through, with the times at which they were due."""

    def __init__(self, bootstrap: str, collecting: Collecting) -> None:
        self.bootstrap = bootstrap
        self._collecting = collecting
        self._sent: list[Sent] = []
        self.sent = 0
        self.measured = slice(0, 0)
        self.before = self.after = OnlineHits(0, 0)

    def click(self, events: Sequence[BehaviorEvent], rate: float) -> None:
        """Send, and wait until every click has its list."""
        numbered = records(events, first=self.sent)
        self._sent.append(send(self.bootstrap, CLICKS.name, numbered, poisson(len(numbered), rate, 1)))
        self.sent += len(numbered)
        self._collecting.wait(self.sent, quiet_s=30.0)

    def judged(self, events: Sequence[BehaviorEvent], rate: float) -> OnlineHits:
        """The same, and how many of these clicks were on an item of the list that their user had."""
        consumer = reader(self.bootstrap, RECOMMENDATIONS.name)
        offsets = to_the_end(consumer)
        consumer.close()
        first = self.sent
        self.click(events, rate)
        lists = lists_since(self.bootstrap, RECOMMENDATIONS.name, offsets)
        return online_hits(((str(number), event) for number, event in enumerate(events, first)), lists, K)

    def intended_s(self) -> np.ndarray:
        return np.concatenate([sent.intended_s for sent in self._sent])


def _play(
    story: _Story,
    events: list[BehaviorEvent],
    folder: Path,
    redis_url: str,
    max_minutes: float,
    worker: LocalWorker,
) -> None:
    cold, ranked = _parts(events)
    cut = len(cold) - min(MEASURED_CLICKS, len(cold) // 2)
    _step(f"{len(cold):,} clicks, answered with what is popular: there is no model yet")
    story.click(cold[:cut], COLD_RATE)
    story.before = story.judged(cold[cut:], COLD_RATE / 2)
    console.print(_hits("filled with what is popular", story.before))
    _step("A model is trained on the clicks in the topic, passes its gate, and goes into the running worker")
    _tailrace(
        *("retrain", "--topic", CLICKS.name, "--bootstrap", story.bootstrap, "--redis-url", redis_url),
        *("--registry", str(folder / "models"), "--runs", str(folder / "runs")),
        *("--max-minutes", str(max_minutes)),
    )
    version = _released(worker)
    console.print(f"the worker serves [bold]{version['model']}[/] on {version['engine']}, without a restart")
    _step(f"{len(ranked):,} clicks at {RATE:g} a second, ranked by the model")
    warm_up = min(WARM_UP_CLICKS, len(ranked) // 2)
    story.click(ranked[:warm_up], RATE)
    story.measured = slice(story.sent, story.sent + len(ranked) - warm_up)
    story.after = story.judged(ranked[warm_up:], RATE)
    console.print(_hits("ranked by the model", story.after))
    _step("One user's list, before and after each click")
    _show_changes(story, events, ranked or events)


def _parts(events: list[BehaviorEvent]) -> tuple[list[BehaviorEvent], list[BehaviorEvent]]:
    """What goes in before there is a model, and after: of a short log, seven eighths and the rest."""
    cut = min(COLD_CLICKS, len(events) * 7 // 8)
    return events[:cut], events[cut : cut + WARM_UP_CLICKS + MEASURED_CLICKS]


def _hits(who: str, found: OnlineHits) -> str:
    return (
        f"{found.rate:.1%} of {found.asked:,} clicks were on one of the {K} items of the list before, {who}"
    )


def _show_changes(story: _Story, events: list[BehaviorEvent], recent: list[BehaviorEvent]) -> None:
    """Three clicks on an item in a category that the user's last list does not come from."""
    user = Counter(event.user_id for event in recent).most_common(1)[0][0]
    mine = [event for event in recent if event.user_id == user]
    known = {event.category_id for event in mine}
    others = [event for event in events if event.category_id not in known] or events
    popular = Counter(event.item_id for event in others).most_common(3)
    by_item = {event.item_id: event for event in others}
    now_s = max(event.timestamp for event in events)
    steps = [
        mine[-1].model_copy(update={"timestamp": now_s}),
        *(
            by_item[item].model_copy(update={"user_id": user, "timestamp": now_s + 1 + n})
            for n, (item, _) in enumerate(popular)
        ),
    ]
    consumer = reader(story.bootstrap, RECOMMENDATIONS.name)
    partition = partition_of(consumer, RECOMMENDATIONS.name, user)
    lists: list[Recommendation] = []
    for step in steps:
        to_the_end(consumer)
        story.click([step], 0)
        lists.append(_next_list(consumer, partition, user))
    consumer.close()
    table = Table(title=f"user {user}", title_justify="left")
    for step in steps:
        table.add_column(f"after a click on\n{step.item_id}", justify="right")
    before: set[int] = set()
    columns: list[list[str]] = []
    for answer in lists:
        shown = [item.item_id for item in answer.items[:SHOWN]]
        columns.append(
            [str(item) if item in before or not before else f"[green]+ {item}[/]" for item in shown]
        )
        before = {item.item_id for item in answer.items}
    for row in zip(*(column + [""] * (SHOWN - len(column)) for column in columns), strict=True):
        table.add_row(*row)
    console.print(table)
    changed = sum([i.item_id for i in a.items] != [i.item_id for i in b.items] for a, b in pairwise(lists))
    console.print(
        f"the list changed after {changed} of {len(lists) - 1} clicks ([green]+[/]: new in the list)"
    )


def _next_list(consumer: object, partition: int, user: int) -> Recommendation:
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        for topic_partition, found in consumer.poll(timeout_ms=200).items():  # type: ignore[attr-defined]
            for record in found:
                if topic_partition.partition == partition and record.key == record_key(user):
                    return decode_recommendation(record.value, record.headers)
    raise click.ClickException(f"no list for user {user} within 10 s")


def _released(worker: LocalWorker, timeout_s: float = 30.0) -> dict[str, object]:
    """Wait until the worker says that it serves a model."""
    deadline_s = time.monotonic() + timeout_s
    while (ready := worker.readiness()).get("model") in (None, "none"):
        if time.monotonic() > deadline_s:
            raise click.ClickException(f"the worker did not take the release: {worker.log_path}")
        time.sleep(0.1)
    return ready


def _summary(account: Account, intended_s: np.ndarray, story: _Story, elapsed_s: float) -> None:
    latency_s = (account.first_s - intended_s)[story.measured]
    latency_ms = percentiles(latency_s[~np.isnan(latency_s)])
    table = Table(title="Summary", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in (
        ("clicks in", f"{account.clicks:,}"),
        ("lists out", f"{account.lists:,}"),
        ("lost", str(account.lost)),
        ("sent again, under the same id", f"{account.duplicated:,}"),
        ("answered from popularity, before the model", f"{account.degraded:,}"),
        (f"online HR@{K} before, by popularity", f"{story.before.rate:.4f}"),
        (f"online HR@{K} after, by the model", f"{story.after.rate:.4f}"),
        (f"click to list at {RATE:g}/s, p50", f"{latency_ms['p50']:.1f} ms"),
        (f"click to list at {RATE:g}/s, p99", f"{latency_ms['p99']:.1f} ms"),
        ("this demo took", f"{elapsed_s:.0f} s"),
    ):
        table.add_row(name, value)
    console.print(table)


def _what_next(folder: Path) -> None:
    reports = sorted((folder / "runs").glob("*/report.html"))
    if reports:
        console.print(f"how the training went: {reports[-1]}", soft_wrap=True)
    words = ", ".join(f"[bold]tailrace {word}[/]" for word in ("up", "worker", "watch"))
    console.print(f"the same by hand: {words} (README, By hand)")


def _step(text: str) -> None:
    console.print(f"\n[bold cyan]▸ {text}[/]")


def _with_topics(bootstrap: str) -> str:
    ensure_topics(bootstrap)
    return bootstrap


def _tailrace(*arguments: str) -> None:
    # Beside a broker and a worker on a slow machine the gate would refuse the model for its latency.
    environment = {"GATE_LATENCY_MS": "500", **os.environ}
    command = [sys.executable, "-m", "infra.cli", *arguments]
    done = subprocess.run(command, cwd=Path.cwd(), env=environment, check=False)
    if done.returncode:
        raise click.ClickException(f"`tailrace {arguments[0]}` failed")


if __name__ == "__main__":
    demo()
