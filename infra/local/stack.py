"""Kafka and Redis of this checkout, as `tailrace up`, `down` and `status` see them."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from infra.local.endpoints import Endpoints, state_file
from infra.local.kafka import LocalKafka
from infra.local.paths import local_dir
from infra.local.redis import LocalRedis
from infra.local.server import LocalServer, ServerFailed, free_port, is_free
from topics.admin import TopicState, ensure_topics
from topics.catalog import suffixed

KAFKA_PORT = 9092
REDIS_PORT = 6379


@dataclass(frozen=True, slots=True)
class Up:
    """`notes` are sentences about what is not as one would expect, such as another port."""

    endpoints: Endpoints
    topics: Sequence[TopicState]
    notes: Sequence[str]


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """One server of ours; `pid` and `memory_mb` are None where it does not run."""

    name: str
    address: str
    running: bool
    pid: int | None
    memory_mb: float | None
    log: str


def up(kafka_port: int | None = None, redis_port: int | None = None, topic_suffix: str = "") -> Up:
    """Start what does not run yet, create the topics, and record where both are.

    A port given must be free; the default port is used where it is free, else one that is.
    """
    with _locked():
        kafka_port, kafka_note = choose_port("kafka", kafka_port, KAFKA_PORT)
        redis_port, redis_note = choose_port("redis", redis_port, REDIS_PORT)
        redis = LocalRedis(local_dir() / "redis", port=redis_port).start()
        kafka = LocalKafka(local_dir() / "kafka", port=kafka_port).start()
        found = Endpoints(bootstrap=kafka.bootstrap, redis_url=redis.url)
        state = {"bootstrap": found.bootstrap, "redis_url": found.redis_url}
        state_file().write_text(json.dumps(state, indent=2) + "\n")
        topics = ensure_topics(found.bootstrap, suffixed(topic_suffix))
    return Up(found, topics, [note for note in (kafka_note, redis_note) if note])


def down() -> list[str]:
    """Stop what `up` started here, and nothing else; the names of what ran. The data stay."""
    with _locked():
        running = [server for server in _servers() if server.pid is not None]
        for server in running:
            server.stop()
        state_file().unlink(missing_ok=True)
    return [server.name for server in running]


def status() -> list[ServerStatus]:
    """The servers `up` starts, running or not."""
    return [_status(server) for server in _servers()]


def _servers() -> list[LocalServer]:
    return [LocalKafka(local_dir() / "kafka"), LocalRedis(local_dir() / "redis")]


def _status(server: LocalServer) -> ServerStatus:
    pid = server.pid
    return ServerStatus(
        name=server.name,
        address=server.address if server.known else "-",
        running=pid is not None,
        pid=pid,
        memory_mb=round(psutil.Process(pid).memory_info().rss / 1e6, 1) if pid else None,
        log=str(server.log_path),
    )


def choose_port(name: str, given: int | None, default: int) -> tuple[int, str]:
    """The port to start on, or the one it already runs on; and a sentence where it is not the default."""
    server = next(server for server in _servers() if server.name == name)
    if server.pid is not None:
        if given not in (None, server.port):
            raise ServerFailed(f"{name} already runs on port {server.port}; `tailrace down` stops it")
        return server.port, ""
    if given is not None:
        # `start` would refuse as well, but only after the other server is up.
        if not is_free(given):
            raise ServerFailed(
                f"port {given} for {name} is taken by another program: --{name}-port takes another"
            )
        return given, ""
    if is_free(default):
        return default, ""
    port = free_port()
    return port, f"port {default} is taken by another program: {name} listens on {port} instead"


@contextmanager
def _locked() -> Iterator[None]:
    local_dir().mkdir(parents=True, exist_ok=True)
    with (local_dir() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
