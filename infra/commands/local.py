"""`tailrace up`, `down` and `status`: real Kafka and Redis on this machine."""

from __future__ import annotations

import dataclasses
import json
from urllib.parse import urlsplit

import click

from infra.commands import options
from infra.local import stack
from infra.local.endpoints import endpoints
from infra.local.server import ServerFailed
from topics.admin import TopicMismatch


@click.command()
@click.option("--kafka-port", type=click.IntRange(1, 65535), help="Default 9092, or a free one.")
@click.option("--redis-port", type=click.IntRange(1, 65535), help="Default 6379, or a free one.")
@options.topic_suffix
@options.one_json
def up(*, kafka_port: int | None, redis_port: int | None, topic_suffix: str, as_json: bool) -> None:
    """Start a Kafka broker and a Redis of this checkout's own, and create the topics.

    What already runs is left alone. Data, logs and the addresses are under .tailrace/local; the other
    commands find them there, unless TAILRACE_BOOTSTRAP and TAILRACE_REDIS_URL say otherwise.

    \b
    tailrace up
    tailrace up --kafka-port 19092 --redis-port 16379
    """
    try:
        result = stack.up(kafka_port, redis_port, topic_suffix)
    except (ServerFailed, TopicMismatch) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
        return
    for note in result.notes:
        click.echo(note)
    click.echo(f"kafka   {result.endpoints.bootstrap}")
    click.echo(f"redis   {result.endpoints.redis_url}")
    click.echo(f"topics  {', '.join(f'{topic.name} ({topic.partitions})' for topic in result.topics)}")


@click.command()
def down() -> None:
    """Stop the broker and the Redis that `tailrace up` started here, and nothing else. The data stay."""
    try:
        stopped = stack.down()
    except ServerFailed as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"stopped {', '.join(stopped)}" if stopped else "nothing of ours was running")


@click.command()
@options.one_json
def status(as_json: bool) -> None:
    """What `tailrace up` started, and the addresses the other commands use.

    Ends with 1 where one of the servers does not run.

    \b
    tailrace status
    tailrace status --json | jq -r .bootstrap
    """
    servers, found = stack.status(), endpoints()
    if as_json:
        rows = [dataclasses.asdict(server) for server in servers]
        click.echo(json.dumps({**dataclasses.asdict(found), "servers": rows}))
    else:
        for server in servers:
            runs = f"process {server.pid}, {server.memory_mb:.0f} MB" if server.running else "not running"
            click.echo(f"{server.name:<7} {server.address:<21} {runs}")
        # A password is for programs (--json), not for a screen.
        password = urlsplit(found.redis_url).password
        redis_url = found.redis_url.replace(f":{password}@", ":***@") if password else found.redis_url
        click.echo(f"commands use {found.bootstrap} and {redis_url}")
    if not all(server.running for server in servers):
        raise SystemExit(1)
