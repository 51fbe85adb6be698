"""Broker and Redis in containers, with the controls of `infra.local`, for `pytest --brokers=containers`.

The images are those of docker-compose.yml. With a Docker engine they are the public ones; without,
`infra/containers/with-engine.sh` builds stand-ins of the same names.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any, Self

from testcontainers.core.container import DockerContainer

from infra.local.server import HOST, free_port
from tests.support import eventually
from topics.admin import TopicsUnavailable, ping

COMPOSE = Path(__file__).resolve().parents[2] / "docker-compose.yml"


def image(service: str) -> str:
    """The image that docker-compose.yml names for a service."""
    found = re.search(rf"^  {service}:\n(?:    .*\n)*?    image: (\S+)$", COMPOSE.read_text(), re.MULTILINE)
    assert found, f"{COMPOSE.name} names no image for {service}"
    return found[1]


class _Server:
    """One container on a fixed host port, so that a restart keeps the address."""

    def __init__(self, container: DockerContainer, container_port: int) -> None:
        self.port = free_port()
        self._container = container.with_bind_ports(container_port, self.port)
        self._state = "absent"

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self._container.stop()

    def start(self, *, timeout_s: float = 90.0) -> Self:
        """Return once it answers its protocol. Does nothing where it already runs."""
        if self._state == "running":
            return self
        if self._state == "absent":
            self._container.start()
        elif self._state == "paused":
            self._docker().unpause()
        else:
            self._docker().start()
        self._state = "running"
        eventually(self._answers, timeout_s, what=f"{self._container.image} answers")
        return self

    def stop(self, *, timeout_s: float = 30.0) -> None:
        self._docker().stop(timeout=int(timeout_s))
        self._state = "stopped"

    def kill(self) -> None:
        self._docker().kill()
        self._state = "stopped"

    def pause(self) -> None:
        self._docker().pause()
        self._state = "paused"

    def resume(self) -> None:
        self._docker().unpause()
        self._state = "running"

    def _docker(self) -> Any:
        return self._container.get_wrapped_container()

    def _answers(self) -> bool:
        raise AssertionError("each server asks in its own protocol")


class ContainerKafka(_Server):
    """The broker; `bootstrap` is its address from outside."""

    def __init__(self) -> None:
        super().__init__(DockerContainer(image("kafka")), 9092)
        settings = {
            "KAFKA_NODE_ID": "1",
            "KAFKA_PROCESS_ROLES": "broker,controller",
            "KAFKA_LISTENERS": "BROKER://:9092,CONTROLLER://:9093",
            "KAFKA_ADVERTISED_LISTENERS": f"BROKER://{self.address}",
            "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "KAFKA_INTER_BROKER_LISTENER_NAME": "BROKER",
            "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER",
            "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
            "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
            "KAFKA_OFFSETS_TOPIC_NUM_PARTITIONS": "4",
            "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
            "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": "1",
            "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
            "KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false",
            "KAFKA_MESSAGE_MAX_BYTES": str(16 * 1024 * 1024),
            "KAFKA_BROKER_SESSION_TIMEOUT_MS": "4000",
            "KAFKA_BROKER_HEARTBEAT_INTERVAL_MS": "500",
            "KAFKA_HEAP_OPTS": "-Xmx512m",
        }
        for name, value in settings.items():
            self._container.with_env(name, value)

    @property
    def bootstrap(self) -> str:
        return self.address

    def _answers(self) -> bool:
        try:
            return ping(self.bootstrap) > 0
        except TopicsUnavailable:
            return False


class ContainerRedis(_Server):
    """Redis with the append-only file on; `url` names database 0."""

    def __init__(self) -> None:
        # Debian's redis-server, in the stand-in image, answers strangers only where told to.
        command = "redis-server --protected-mode no --appendonly yes --appendfsync everysec --save ''"
        super().__init__(DockerContainer(image("redis")).with_command(command), 6379)

    @property
    def url(self) -> str:
        return f"redis://{self.address}/0"

    def _answers(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False
