"""Topics on a real broker."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable

import pytest
from kafka.admin import KafkaAdminClient

from infra.local.server import free_port
from tests.support import eventually, unique
from topics.admin import TopicMismatch, TopicsUnavailable, ensure_topics, main, ping, topic_epoch
from topics.catalog import CLICKS, RELEASES, TOPICS, Topic


def test_the_catalogue_is_created_once_and_then_found_unchanged(bootstrap: str) -> None:
    suffix = unique("")
    topics = [dataclasses.replace(topic, name=topic.name + suffix) for topic in TOPICS]
    first = ensure_topics(bootstrap, topics)
    second = ensure_topics(bootstrap, topics)
    assert [state.name for state in first] == [topic.name for topic in topics]
    assert [state.partitions for state in first] == [topic.partitions for topic in TOPICS]
    assert all(state.created for state in first)
    assert second == [dataclasses.replace(state, created=False) for state in first]


def test_a_topic_missing_beside_present_ones_is_added(bootstrap: str) -> None:
    clicks, releases = (dataclasses.replace(t, name=unique(t.name)) for t in (CLICKS, RELEASES))
    ensure_topics(bootstrap, [clicks])
    assert [state.created for state in ensure_topics(bootstrap, [clicks, releases])] == [False, True]


def test_other_partitions_and_other_settings_are_refused_by_name(bootstrap: str) -> None:
    made = dataclasses.replace(CLICKS, name=unique("clicks"), partitions=2, config={"retention.ms": "1000"})
    ensure_topics(bootstrap, [made])
    wanted = dataclasses.replace(CLICKS, name=made.name)
    with pytest.raises(TopicMismatch) as refused:
        ensure_topics(bootstrap, [wanted])
    assert f"{made.name} has 2 partitions, not 8" in str(refused.value)
    assert f"{made.name} has retention.ms=1000, not {CLICKS.config['retention.ms']}" in str(refused.value)


def test_a_recreated_topic_has_another_epoch(
    bootstrap: str, make_topics: Callable[..., dict[str, Topic]]
) -> None:
    clicks = make_topics(partitions=1)["clicks"]
    before = topic_epoch(bootstrap, clicks.name)
    assert 0 <= before < 2**32
    assert topic_epoch(bootstrap, clicks.name) == before
    admin = KafkaAdminClient(bootstrap_servers=bootstrap)
    try:
        described = admin.describe_topics([clicks.name])[0]["topic_id"]
        assert uuid.UUID(str(described)).int % 2**32 == before
        admin.delete_topics([clicks.name])
        eventually(lambda: clicks.name not in admin.list_topics(), what="the topic is deleted")
    finally:
        admin.close()
    ensure_topics(bootstrap, [clicks])
    assert topic_epoch(bootstrap, clicks.name) != before


def test_an_unknown_topic_has_no_epoch(bootstrap: str) -> None:
    with pytest.raises(TopicsUnavailable, match="no topic 'nowhere'"):
        topic_epoch(bootstrap, "nowhere")


def test_an_unreachable_broker_is_named_at_once() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(TopicsUnavailable, match=address):
        ping(address)


def test_an_address_without_a_port_is_named() -> None:
    with pytest.raises(TopicsUnavailable, match="somewhere"):
        ping("somewhere")


def test_the_command_ends_with_a_sentence_where_no_broker_is() -> None:
    with pytest.raises(SystemExit, match="no Kafka broker listens at somewhere:1"):
        main("somewhere:1")
