"""The catalogue's topics on a broker: created where absent, checked where present.

python -m topics.admin localhost:9092 [SUFFIX]
"""

from __future__ import annotations

import logging
import socket
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient
from kafka.errors import KafkaError, TopicAlreadyExistsError

from topics.catalog import TOPICS, Topic, suffixed

_log = logging.getLogger(__name__)


class TopicsUnavailable(ConnectionError):
    """No broker answered in time, or it refused; the message names the address."""


class TopicMismatch(RuntimeError):
    """A topic exists and is not as the catalogue says; the message names each difference."""


@dataclass(frozen=True, slots=True)
class TopicState:
    """A topic as the broker has it. `epoch` (u32) tells a recreated topic from the one before it."""

    name: str
    partitions: int
    epoch: int
    created: bool


def ensure_topics(
    bootstrap: str, topics: Sequence[Topic] = TOPICS, *, timeout_s: float = 15.0, replication: int = -1
) -> list[TopicState]:
    """Create the topics that are absent and check all of them. `replication` -1 is the broker's default.

    Raises `TopicMismatch` where partitions or a setting of the catalogue differ. Nothing is altered:
    added partitions would move users away from their sequences' fences.
    """
    names = [topic.name for topic in topics]
    with _admin(bootstrap, timeout_s) as admin:
        found = _described(admin, names)
        absent = [topic for topic in topics if topic.name not in found]
        if absent:
            _create(admin, absent, timeout_s, replication)
            found = _described(admin, names)
        differences = _differences(admin, topics, found)
        if differences:
            raise TopicMismatch(f"topics at {bootstrap} differ from the catalogue: {'; '.join(differences)}")
    return [
        TopicState(
            name=topic.name,
            partitions=len(found[topic.name]["partitions"]),
            epoch=_epoch(found[topic.name]),
            created=topic in absent,
        )
        for topic in topics
    ]


def topic_epochs(bootstrap: str, names: Sequence[str], *, timeout_s: float = 15.0) -> dict[str, int]:
    """By name a u32 made from the topic's id (KIP-516): a topic that was deleted and created again has
    another. `TopicsUnavailable` where no broker answers, or one has not all of the topics."""
    with _admin(bootstrap, timeout_s) as admin:
        found = _described(admin, names)
    for name in names:
        if name not in found:
            raise TopicsUnavailable(
                f"there is no topic {name!r} at {bootstrap}; `tailrace up` creates the topics"
            )
    return {name: _epoch(found[name]) for name in names}


def topic_epoch(bootstrap: str, topic: str) -> int:
    """`topic_epochs` of one."""
    return topic_epochs(bootstrap, [topic])[topic]


def ping(bootstrap: str, *, timeout_s: float = 5.0) -> int:
    """How many brokers answer a metadata request; `TopicsUnavailable` where none does."""
    with _admin(bootstrap, timeout_s) as admin:
        return len(admin.describe_cluster()["brokers"])


def check_listens(bootstrap: str, *, timeout_s: float = 5.0) -> None:
    """`TopicsUnavailable` where no port of the list takes connections."""
    if not any(_listens(server, timeout_s) for server in bootstrap.split(",")):
        raise TopicsUnavailable(f"no Kafka broker listens at {bootstrap}; `tailrace up` starts one")


@contextmanager
def _admin(bootstrap: str, timeout_s: float) -> Iterator[KafkaAdminClient]:
    # KafkaAdminClient retries a refused connection until its timeout and leaves its thread behind
    # when it gives up: ask the port first.
    check_listens(bootstrap, timeout_s=timeout_s)
    timeout_ms = int(timeout_s * 1000)
    try:
        admin = KafkaAdminClient(
            bootstrap_servers=bootstrap.split(","),
            client_id="tailrace-admin",
            bootstrap_timeout_ms=timeout_ms,
            request_timeout_ms=timeout_ms,
        )
    except KafkaError as error:
        raise TopicsUnavailable(f"{bootstrap} does not answer as a Kafka broker: {error}") from error
    try:
        yield admin
    except KafkaError as error:
        raise TopicsUnavailable(f"the broker at {bootstrap} refused: {error}") from error
    finally:
        admin.close()


def _listens(server: str, timeout_s: float) -> bool:
    host, _, port = server.strip().rpartition(":")
    try:
        with socket.create_connection((host or "localhost", int(port)), timeout=timeout_s):
            return True
    except (OSError, ValueError):
        return False


def _described(admin: KafkaAdminClient, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Metadata of those that exist, by name."""
    found = admin.describe_topics(list(names))
    return {topic["name"]: topic for topic in found if topic["error_code"] == 0}


def _create(admin: KafkaAdminClient, topics: Sequence[Topic], timeout_s: float, replication: int) -> None:
    timeout_ms = int(timeout_s * 1000)
    wanted = {
        topic.name: {
            "num_partitions": topic.partitions,
            "replication_factor": replication,
            "configs": topic.config,
        }
        for topic in topics
    }
    try:
        admin.create_topics(wanted, timeout_ms=timeout_ms)
    except TopicAlreadyExistsError:
        _log.info("another process created topics at the same moment; checking what it made")
    admin.wait_for_topics(list(wanted), timeout_ms=timeout_ms)


def _differences(
    admin: KafkaAdminClient, topics: Sequence[Topic], found: dict[str, dict[str, Any]]
) -> list[str]:
    resources = [ConfigResource(ConfigResourceType.TOPIC, topic.name) for topic in topics]
    settings = admin.describe_configs(resources, config_filter="all")["topic"]
    lines = []
    for topic in topics:
        partitions = len(found[topic.name]["partitions"])
        if partitions != topic.partitions:
            lines.append(f"{topic.name} has {partitions} partitions, not {topic.partitions}")
        for name, wanted in topic.config.items():
            value = settings[topic.name][name]["value"]
            if value != wanted:
                lines.append(f"{topic.name} has {name}={value}, not {wanted}")
    return lines


def _epoch(described: dict[str, Any]) -> int:
    # Kafka draws topic ids at random, so any 32 of the low bits will do.
    return uuid.UUID(str(described["topic_id"])).int & 0xFFFF_FFFF


def main(bootstrap: str = "localhost:9092", suffix: str = "") -> None:
    try:
        states = ensure_topics(bootstrap, suffixed(suffix))
    except (TopicsUnavailable, TopicMismatch) as error:
        raise SystemExit(str(error)) from None
    for state in states:
        made = "created" if state.created else "present"
        sys.stdout.write(f"{state.name}: {made}, {state.partitions} partitions, epoch {state.epoch}\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])
