"""Saying on `model-releases` that a version has changed stage."""

from __future__ import annotations

from topics.messages import ModelReleased


def announce(bootstrap: str, topic_suffix: str, alias: str, releases: list[ModelReleased]) -> str | None:
    """Send announcements in order; returns when the broker has them. What went wrong, in a sentence,
    where it cannot be reached: the alias has changed all the same."""
    from kafka import KafkaProducer
    from kafka.errors import KafkaError

    from topics.catalog import RELEASES
    from topics.codec import encode

    try:
        producer = KafkaProducer(bootstrap_servers=bootstrap.split(","), acks="all", max_block_ms=15_000)
        try:
            for release in releases:
                value, headers = encode(release)
                sent = producer.send(
                    RELEASES.name + topic_suffix, key=alias.encode(), value=value, headers=headers
                )
                sent.get(timeout=30)
        finally:
            producer.close(timeout=5)
    except KafkaError as error:
        return f"{bootstrap}: the release was not announced: {error}"
    return None
