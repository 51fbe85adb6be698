"""Servers for integration tests: real ones of our own, or the same in containers.

pytest                        processes of this machine (`infra.local`)
pytest --brokers=containers   testcontainers, images as in docker-compose.yml
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis

from infra.bench.rig import Rig
from infra.local.kafka import LocalKafka
from infra.local.redis import LocalRedis
from infra.local.worker import LocalWorker
from tests.models import small_registry
from tests.support import unique
from topics.admin import ensure_topics
from topics.catalog import TOPICS, Topic

if TYPE_CHECKING:
    from tests.containers.servers import ContainerKafka, ContainerRedis

ROOT = Path(__file__).resolve().parent.parent
MakeTopics = Callable[..., dict[str, Topic]]
StartWorker = Callable[..., LocalWorker]


# A key that a developer of this checkout trusts is no key of the tests' registries.
os.environ["TAILRACE_REQUIRE_SIGNATURE"] = "no"
# What tests prepare is kept apart from what this user has prepared, and not at all after them.
_CACHE = tempfile.TemporaryDirectory(prefix="tailrace-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--brokers",
        choices=["local", "containers"],
        default="local",
        help="where the broker and the Redis of integration tests come from",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that asks for a server is an integration test, marked or not."""
    for item in items:
        if {"kafka", "redis_server"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def kafka(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalKafka | ContainerKafka]:
    """One broker for the whole run; `.bootstrap`, and `.stop()`, `.start()`, `.kill()`, `.pause()`."""
    if request.config.getoption("--brokers") == "containers":
        from tests.containers.servers import ContainerKafka

        with ContainerKafka() as broker:
            yield broker
    else:
        with LocalKafka(tmp_path_factory.mktemp("kafka")) as broker:
            yield broker


@pytest.fixture(scope="session")
def redis_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalRedis | ContainerRedis]:
    """One Redis for the whole run; tests take `redis_url`, fault tests break this."""
    if request.config.getoption("--brokers") == "containers":
        from tests.containers.servers import ContainerRedis

        with ContainerRedis() as server:
            yield server
    else:
        with LocalRedis(tmp_path_factory.mktemp("redis")) as server:
            yield server


@pytest.fixture
def bootstrap(kafka: LocalKafka | ContainerKafka) -> str:
    """The broker's address, whatever an earlier test did to the broker."""
    return kafka.start().bootstrap


@pytest.fixture
def redis_url(redis_server: LocalRedis | ContainerRedis) -> str:
    """An empty Redis, whatever an earlier test did to it."""
    url = redis_server.start().url
    with redis.Redis.from_url(url) as client:
        client.flushall()
        client.config_resetstat()
    return url


@pytest.fixture
def make_topics(bootstrap: str) -> MakeTopics:
    """Makes the catalogue's topics under names of this test's own: `make_topics(partitions=4)["clicks"]`."""

    def make(partitions: int | None = None) -> dict[str, Topic]:
        suffix = unique("")
        topics = {
            topic.name: dataclasses.replace(
                topic,
                name=topic.name + suffix,
                partitions=partitions if partitions and topic.partitions > 1 else topic.partitions,
            )
            for topic in TOPICS
        }
        ensure_topics(bootstrap, list(topics.values()))
        return topics

    return make


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The public click logs, where this machine has them: $TAILRACE_DATA or ../shared/data."""
    path = Path(os.environ.get("TAILRACE_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no public click logs at {path}; TAILRACE_DATA names their folder")
    return path


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with a small trained model behind its `serving` alias."""
    return small_registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture
def parts(
    kafka: LocalKafka | ContainerKafka,
    bootstrap: str,
    redis_server: LocalRedis | ContainerRedis,
    redis_url: str,
    make_topics: MakeTopics,
    registry: Path,
    tmp_path: Path,
) -> Rig:
    """The run's broker and Redis with topics of this test's own, and a released model."""
    suffix = make_topics(partitions=4)["clicks"].name.removeprefix("clicks")
    return Rig(tmp_path, kafka, redis_server, registry, suffix)


@pytest.fixture
def start_worker(parts: Rig) -> Iterator[StartWorker]:
    """Starts workers and stops them after the test: `start_worker(name, options=[…], environment={…})`."""
    started: list[LocalWorker] = []

    def start(name: str | None = None, **told: Any) -> LocalWorker:
        worker = parts.worker(name or unique("worker"), **told)
        started.append(worker)
        return worker.start()

    yield start
    for worker in started:
        worker.stop()
