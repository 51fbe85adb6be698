"""What sequences must be, recomputed from the log of record by the plainest code there is.

It shares nothing with the feature store but the layout of a packed value.
"""

from __future__ import annotations

from collections import defaultdict

import redis

from features.keys import sequence
from features.sequence import unpack
from features.settings import FeatureSettings
from infra.clients import everything, reader
from topics.codec import DecodeError, decode_click
from topics.messages import BEHAVIORS

Event = tuple[int, int, int, int]


def expected_sequences(bootstrap: str, topic: str) -> tuple[dict[int, list[Event]], int]:
    """Per user (item, category, behaviour, timestamp), oldest first; and how many clicks were good."""
    settings = FeatureSettings()
    sequences: dict[int, list[Event]] = defaultdict(list)
    accepted = 0
    consumer = reader(bootstrap, topic)
    try:
        for record in everything(consumer):
            try:
                event = decode_click(record.key, record.value, record.headers)
            except DecodeError:
                continue
            accepted += 1
            kept = sequences[event.user_id]
            kept.append((event.item_id, event.category_id, BEHAVIORS.index(event.behavior), event.timestamp))
            oldest_s = event.timestamp - settings.sequence_max_age_s
            while kept[0][3] < oldest_s:
                kept.pop(0)
            del kept[: -settings.sequence_events]
    finally:
        consumer.close()
    return dict(sequences), accepted


def differing_users(redis_url: str, expected: dict[int, list[Event]]) -> list[int]:
    """Users whose sequence in Redis is not the expected one."""
    users = list(expected)
    wrong: list[int] = []
    with redis.Redis.from_url(redis_url) as client:
        for start in range(0, len(users), 1000):
            some = users[start : start + 1000]
            batch = unpack(client.mget([sequence(user) for user in some]))
            rows = zip(
                batch.items.tolist(),
                batch.categories.tolist(),
                batch.behaviors.tolist(),
                batch.timestamps.tolist(),
                strict=True,
            )
            flat = list(rows)
            at = 0
            for user, length in zip(some, batch.lengths.tolist(), strict=True):
                if flat[at : at + length] != expected[user]:
                    wrong.append(user)
                at += length
    return wrong
