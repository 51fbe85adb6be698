"""`tailrace watch` and `tailrace recommend`: ranked lists for a person or a program to read."""

from __future__ import annotations

import time
import uuid
from typing import Any

import click

from infra.commands import options
from infra.printable import printable
from topics.messages import MAX_ID, MAX_LIST, Recommendation

USER = click.IntRange(0, MAX_ID)
SHOWN = 10


def _print(recommendation: Recommendation, as_json: bool) -> None:
    if as_json:
        click.echo(recommendation.model_dump_json(exclude_none=True))
        return
    trigger = recommendation.trigger
    cause = (
        f"after {', '.join(str(click_.item_id) for click_ in trigger.clicks)}"
        if trigger.kind == "click"
        else f"asked {printable(trigger.request_id or '')}"
    )
    flag = (
        click.style(f" degraded: {recommendation.degraded}", fg="yellow") if recommendation.degraded else ""
    )
    timings_ms = recommendation.timings_ms
    took = f" {timings_ms['rank']:.1f} ms" if "rank" in timings_ms else ""
    click.echo(
        f"{click.style(f'user {recommendation.user_id}', bold=True)} {cause}"
        f"  [{printable(f'{recommendation.model_version} {recommendation.engine}')}{took}]{flag}"
    )
    for place, item in enumerate(recommendation.items[:SHOWN], 1):
        click.echo(f"  {place:>2}. {item.item_id:<12} {item.score:>9.3f}  {item.source}")
    if len(recommendation.items) > SHOWN:
        click.echo(f"      … {len(recommendation.items) - SHOWN} more (--json has all)")


@click.command()
@options.bootstrap
@options.topic_suffix
@click.option("--user", type=USER, help="Only this user's lists.")
@click.option("--from-start", is_flag=True, help="From the oldest list kept, not from now.")
@click.option("--limit", type=click.IntRange(1), help="Stop after that many lists.")
@options.as_json
def watch(
    *, bootstrap: str, topic_suffix: str, user: int | None, from_start: bool, limit: int | None, as_json: bool
) -> None:
    """Follow the recommendations topic until Ctrl-C.

    \b
    tailrace watch
    tailrace watch --user 100234 --limit 5
    tailrace watch --json | jq .items[0].item_id
    """
    from infra.clients import partition_of, reader, to_the_end
    from topics.catalog import RECOMMENDATIONS
    from topics.codec import DecodeError, decode_recommendation, record_key

    topic = RECOMMENDATIONS.name + topic_suffix
    consumer = reader(bootstrap, topic)
    if user is not None:
        from kafka import TopicPartition

        consumer.assign([TopicPartition(topic, partition_of(consumer, topic, user))])
    if from_start:
        consumer.seek_to_beginning()
    else:
        to_the_end(consumer)
    key = None if user is None else record_key(user)
    seen = 0
    try:
        while limit is None or seen < limit:
            for records in consumer.poll(timeout_ms=500).values():
                for record in records:
                    if (key is not None and record.key != key) or seen == limit:
                        continue
                    try:
                        _print(decode_recommendation(record.value, record.headers), as_json)
                    except DecodeError as error:
                        click.echo(f"offset {record.offset} is not a list: {error}", err=True)
                    seen += 1
    except KeyboardInterrupt:
        click.echo("", err=True)
    finally:
        consumer.close()


@click.command()
@click.argument("user", type=USER)
@options.bootstrap
@options.topic_suffix
@click.option("--k", type=click.IntRange(1, MAX_LIST), default=10, show_default=True, help="How many items.")
@click.option("--candidate", "candidates", type=USER, multiple=True, help="Rank exactly these; repeatable.")
@click.option("--exclude", type=USER, multiple=True, help="Never this item; repeatable.")
@click.option("--priority", type=click.Choice(["high", "normal", "low"]), default="normal", show_default=True)
@click.option("--deadline-ms", type=click.IntRange(1, 60_000), help="Past it, a degraded list at once.")
@click.option("--timeout-s", type=options.FiniteRange(0.1), default=10.0, show_default=True)
@options.as_json
def recommend(
    *,
    user: int,
    bootstrap: str,
    topic_suffix: str,
    k: int,
    candidates: tuple[int, ...],
    exclude: tuple[int, ...],
    priority: Any,
    deadline_ms: int | None,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Ask for one user's list, once, through the recommendation-requests topic.

    \b
    tailrace recommend 100234
    tailrace recommend 100234 --k 5 --exclude 1827080
    tailrace recommend 7 --candidate 11 --candidate 12 --json
    """
    from kafka import TopicPartition

    from infra.clients import Outgoing, partition_of, producer, reader, to_the_end
    from topics.catalog import RECOMMENDATIONS, REQUESTS
    from topics.codec import decode_recommendation, encode, record_key
    from topics.messages import RecommendRequest

    request = RecommendRequest(
        request_id=uuid.uuid4().hex,
        user_id=user,
        k=k,
        candidates=list(candidates) or None,
        exclude=list(exclude),
        priority=priority,
        deadline_ms=deadline_ms,
    )
    topic = RECOMMENDATIONS.name + topic_suffix
    consumer = reader(bootstrap, topic)
    consumer.assign([TopicPartition(topic, partition_of(consumer, topic, user))])
    to_the_end(consumer)
    client = producer(bootstrap, linger_ms=0)
    try:
        value, headers = encode(request)
        asking = Outgoing(client, timeout_s=timeout_s)
        asking.send(REQUESTS.name + topic_suffix, key=record_key(user), value=value, headers=headers)
        asking.finish()
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            for records in consumer.poll(timeout_ms=200).values():
                for record in records:
                    told = record.value or b""
                    if record.key == record_key(user) and request.request_id.encode() in told:
                        _print(decode_recommendation(record.value, record.headers), as_json)
                        return
    finally:
        client.close(timeout=5)
        consumer.close()
    raise click.ClickException(f"no list came within {timeout_s:g} s; does a `tailrace worker` run?")
