"""`tailrace dead-letters`: what could not be read, and sending it again."""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import click
import orjson

from infra.commands import options
from infra.printable import printable
from topics.codec import ATTEMPTS_HEADER, DROPPED_HEADER, LETTER_HEADERS

SHOWN_BYTES = 60
# Letters may be megabytes each.
MAX_UNSENT = 100
# The others came with the record and go back with it.
OURS = (*LETTER_HEADERS, DROPPED_HEADER)
MAX_LETTER_BYTES = 32 * 1024 * 1024


@click.group(name="dead-letters")
def dead_letters() -> None:
    """Records that could not be read, with their reasons and their bytes untouched.

    \b
    tailrace dead-letters list
    tailrace dead-letters list --json > letters.jsonl     then mend the values, and
    tailrace dead-letters replay --file letters.jsonl
    """


def _letters(bootstrap: str, topic: str, reason: str | None) -> Iterator[dict[str, Any]]:
    from infra.clients import everything, reader

    consumer = reader(bootstrap, topic, max_partition_fetch_bytes=MAX_LETTER_BYTES)
    try:
        for record in everything(consumer):
            # A header's value may be null.
            headers = {name: (value or b"").decode("utf-8", "replace") for name, value in record.headers}
            if reason is not None and headers.get("reason", "") != reason:
                continue
            yield {
                "offset": record.offset,
                **{name: headers.get(name, "") for name in OURS if name != "offset"},
                "source_offset": headers.get("offset", ""),
                "headers": [
                    {"name": name, **_text("value", value)}
                    for name, value in record.headers
                    if name not in OURS
                ],
                **_text("key", record.key),
                **_text("value", record.value),
            }
    finally:
        consumer.close()


def _text(name: str, data: bytes | None) -> dict[str, str | None]:
    """Bytes as text where they are text, else as base64 under another name."""
    if data is None:
        return {name: None}
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(data).decode()}


def _bytes(letter: dict[str, Any], name: str) -> bytes | None:
    if f"{name}_base64" in letter:
        return base64.b64decode(letter[f"{name}_base64"], validate=True)
    value = letter.get(name)
    if value is None:
        return None
    return value.encode() if isinstance(value, str) else orjson.dumps(value)


@dead_letters.command(name="list")
@options.bootstrap
@options.topic_suffix
@click.option("--reason", help="Only this reason, as in the summary.")
@click.option("--limit", type=click.IntRange(1), help="At most that many.")
@options.as_json
def list_(bootstrap: str, topic_suffix: str, reason: str | None, limit: int | None, as_json: bool) -> None:
    """Show dead letters, oldest first, and count them by reason."""
    from topics.catalog import DEAD_LETTERS

    counts: Counter[str] = Counter()
    for number, letter in enumerate(_letters(bootstrap, DEAD_LETTERS.name + topic_suffix, reason)):
        if number == limit:
            break
        counts[letter["reason"]] += 1
        if as_json:
            click.echo(orjson.dumps(letter).decode())
            continue
        value = letter.get("value") or letter.get("value_base64") or ""
        shown = printable(value[:SHOWN_BYTES])
        if len(value) > SHOWN_BYTES:
            shown += f"… ({len(value):,} characters)"
        place = printable(f"{letter['topic']}/{letter['partition']}@{letter['source_offset']}")
        click.echo(f"{letter['offset']:>6}  {place:<24} {printable(letter['detail'])}\n        {shown}")
    if not as_json:
        for name, count in counts.most_common():
            click.echo(f"{count:>8,}  {printable(name)}")
        if not counts:
            click.echo("no dead letters")


@dead_letters.command()
@options.bootstrap
@options.topic_suffix
@click.option("--reason", help="Only this reason.")
@click.option(
    "--file",
    "file",
    type=click.File("rb"),
    help="Letters as `list --json` wrote them, with values mended; else the letters as they are.",
)
@click.option("--limit", type=click.IntRange(1), help="At most that many.")
def replay(
    *, bootstrap: str, topic_suffix: str, reason: str | None, file: IO[bytes] | None, limit: int | None
) -> None:
    """Send dead letters to the topic they came from. `attempts` is carried along.

    A mended value that names its user gets that user's key. What still cannot be read comes back
    as a new dead letter with `attempts` one higher. A letter that was too large to be kept whole is
    left out.

    \b
    tailrace dead-letters replay --reason schema-version       after an upgrade of the worker
    tailrace dead-letters replay --file mended.jsonl
    """
    from infra.clients import Outgoing, producer
    from topics.catalog import CLICKS, DEAD_LETTERS, REQUESTS

    known = {CLICKS.name + topic_suffix, REQUESTS.name + topic_suffix}
    letters = _from_file(file) if file else _letters(bootstrap, DEAD_LETTERS.name + topic_suffix, reason)
    client = producer(bootstrap, max_request_size=MAX_LETTER_BYTES)
    sent: Counter[str] = Counter()
    outgoing = Outgoing(client, MAX_UNSENT)
    left_out = 0
    try:
        for letter in letters:
            if reason is not None and letter.get("reason") != reason:
                continue
            if sum(sent.values()) == limit:
                break
            if letter.get(DROPPED_HEADER):
                left_out += 1
                continue
            topic = str(letter.get("topic", ""))
            try:
                if topic not in known:
                    raise ValueError(f"it came from {topic!r}, which is not one of {sorted(known)}")
                value = _bytes(letter, "value")
                key = _key(letter, value)
                # kafka-python sends no header without a value.
                kept = [
                    (str(header["name"]), _bytes(header, "value") or b"")
                    for header in letter.get("headers", [])
                ]
            except (binascii.Error, AttributeError, KeyError, TypeError, ValueError) as error:
                raise click.ClickException(
                    f"letter {letter.get('offset')} is not as `list --json` writes them: {error!r}; "
                    f"{sum(sent.values()):,} before it were sent"
                ) from None
            attempts = str(letter.get(ATTEMPTS_HEADER, "1")).encode()
            outgoing.send(topic, key=key, value=value, headers=[*kept, (ATTEMPTS_HEADER, attempts)])
            sent[topic] += 1
        outgoing.finish()
    finally:
        client.close(timeout=10)
    for topic, count in sent.items():
        click.echo(f"{count:,} letters sent to {topic}")
    if left_out:
        click.echo(f"{left_out:,} letters left out: their bytes were too many to keep")
    if not sent:
        click.echo("no letters to send")


def _from_file(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            letter = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise click.ClickException(
                f"line {number} of {Path(file.name).name} is not JSON: {error}"
            ) from None
        if not isinstance(letter, dict):
            raise click.ClickException(f"line {number} of {Path(file.name).name} is not an object")
        yield letter


def _key(letter: dict[str, Any], value: bytes | None) -> bytes | None:
    """The key of the user a readable value names, else the original key."""
    try:
        user = orjson.loads(value or b"").get("user_id")
    except (orjson.JSONDecodeError, AttributeError):
        user = None
    return b"%d" % user if type(user) is int and user >= 0 else _bytes(letter, "key")
