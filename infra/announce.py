"""Saying on `model-releases` that a version has changed stage."""

from __future__ import annotations

from topics.messages import ModelReleased


def announce(bootstrap: str, topic_suffix: str, alias: str, releases: list[ModelReleased]) -> str | None:
    """Send announcements in order; returns when the broker has them. What went wrong, in a sentence,
    where it cannot be reached: the alias has changed all the same."""
    from kafka.errors import KafkaError

    from infra.clients import producer
    from topics.catalog import RELEASES
    from topics.codec import encode

    try:
        client = producer(bootstrap, linger_ms=0)
        try:
            for release in releases:
                value, headers = encode(release)
                sent = client.send(
                    RELEASES.name + topic_suffix, key=alias.encode(), value=value, headers=headers
                )
                sent.get(timeout=30)
        finally:
            client.close(timeout=5)
    except (KafkaError, ConnectionError) as error:
        return f"{bootstrap}: the release was not announced: {error}"
    return None
