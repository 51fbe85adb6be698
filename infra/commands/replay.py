"""`tailrace replay`: a log as a stream of clicks."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import orjson

from infra.commands import options

# Events whose time has come are sent together; finer steps than this only cost wake-ups.
STEP_S = 0.002


class Pace:
    """When event number n, which happened at `timestamp`, is to be sent; 0 means at once."""

    def __init__(self, rate: float, speed: float) -> None:
        self._rate = rate
        self._speed = speed
        self._started_s = time.monotonic()
        self._first: int | None = None

    def wait_s(self, number: int, timestamp: int) -> float:
        if self._rate:
            due_s = number / self._rate
        elif self._speed:
            self._first = timestamp if self._first is None else self._first
            due_s = (timestamp - self._first) / self._speed
        else:
            return 0.0
        return due_s - (time.monotonic() - self._started_s)


@click.command()
@click.argument("log", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@options.bootstrap
@options.topic_suffix
@click.option(
    "--rate", type=options.FiniteRange(0), default=0, help="Clicks per second; 0 is as fast as possible."
)
@click.option(
    "--speed", type=options.FiniteRange(0), default=0, help="Times real time, by the log's own clock."
)
@click.option("--limit", type=click.IntRange(1), help="Stop after that many clicks.")
@options.as_json
def replay(
    *,
    log: Path,
    bootstrap: str,
    topic_suffix: str,
    rate: float,
    speed: float,
    limit: int | None,
    as_json: bool,
) -> None:
    """Send a Taobao-format log (.csv, .csv.gz) to the clicks topic, in file order.

    Event ids are made from the file's name and line, so a second replay sends the same events.

    \b
    tailrace replay clicks.csv --rate 200
    tailrace replay stream.csv.gz --speed 10 --limit 50000
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from compression.logs.log_reader import LogInvalid, LogReader, iter_events
    from infra.clients import Outgoing, producer
    from infra.clients import reader as topic_reader
    from topics.catalog import CLICKS
    from topics.codec import encode, record_key

    if rate and speed:
        raise click.UsageError("--rate and --speed exclude each other")
    topic = CLICKS.name + topic_suffix
    # A producer waits a minute for a topic that nobody has made, a reader says so.
    topic_reader(bootstrap, topic).close()
    reader = LogReader(log)
    client = producer(bootstrap)
    outgoing = Outgoing(client)
    pace = Pace(rate, speed)
    sent = 0
    started_s = time.monotonic()
    bar = Progress(
        TextColumn("replay"),
        BarColumn(),
        MofNCompleteColumn() if limit else TextColumn("{task.completed:,.0f} clicks"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    try:
        with bar:
            task = bar.add_task("replay", total=limit)
            for event in iter_events(reader):
                wait_s = pace.wait_s(sent, event.timestamp)
                if wait_s > STEP_S:
                    client.flush()
                    time.sleep(max(0.0, pace.wait_s(sent, event.timestamp)))
                value, headers = encode(event)
                outgoing.send(topic, key=record_key(event.user_id), value=value, headers=headers)
                sent += 1
                if sent % 256 == 0:
                    bar.update(task, completed=sent)
                if sent == limit:
                    break
            outgoing.finish()
            bar.update(task, completed=sent)
    except LogInvalid as error:
        raise click.ClickException(str(error)) from error
    finally:
        client.close(timeout=10)
    elapsed_s = time.monotonic() - started_s
    report = reader.report
    if as_json:
        summary = {
            "clicks": sent,
            "seconds": round(elapsed_s, 3),
            "bad_rows": report.bad_rows,
            "reasons": report.reasons,
            "truncated": report.truncated,
        }
        click.echo(orjson.dumps(summary).decode())
        return
    click.echo(f"{sent:,} clicks in {elapsed_s:.1f} s ({sent / max(elapsed_s, 1e-9):,.0f}/s) to {topic}")
    for bad in report.bad:
        click.echo(f"line {bad.line}: {bad.reason}: {bad.detail}", err=True)
    if report.bad_rows > len(report.bad):
        click.echo(
            f"… and {report.bad_rows - len(report.bad):,} more bad rows: {json.dumps(report.reasons)}",
            err=True,
        )
    if report.truncated:
        click.echo(f"the log is cut off: {report.truncated}", err=True)
