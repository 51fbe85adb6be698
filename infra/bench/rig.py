"""A broker, a Redis and workers of a measurement's own, in a temporary folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from infra.clients import lag
from infra.local.kafka import LocalKafka
from infra.local.redis import LocalRedis
from infra.local.worker import LocalWorker
from stream.settings import TopicNames
from topics.admin import ensure_topics


class Broker(Protocol):
    """A Kafka that can be broken: `LocalKafka`, or one in a container."""

    @property
    def bootstrap(self) -> str: ...
    def start(self) -> Any: ...
    def stop(self) -> Any: ...


class Store(Protocol):
    """A Redis that can be broken."""

    @property
    def url(self) -> str: ...
    def start(self) -> Any: ...
    def stop(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Rig:
    """Running Kafka and Redis with the catalogue's topics, under names of their own on a shared broker."""

    folder: Path
    kafka: Broker
    redis: Store
    registry: Path
    topic_suffix: str = ""

    @property
    def topics(self) -> TopicNames:
        return TopicNames.with_suffix(self.topic_suffix)

    @property
    def _group(self) -> str:
        return f"tailrace{self.topic_suffix}"

    def is_through(self) -> bool:
        """Whether the workers have committed every click there is: their lists came before, and none comes
        after."""
        return lag(self.kafka.bootstrap, self.topics.clicks, self._group) == 0

    def worker(
        self,
        name: str = "worker-0",
        *,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> LocalWorker:
        """A worker on this rig, not yet started; its name is its group instance id."""
        return LocalWorker(
            self.folder / name,
            bootstrap=self.kafka.bootstrap,
            redis_url=self.redis.url,
            registry=self.registry,
            instance_id=name,
            group=self._group,
            topic_suffix=self.topic_suffix,
            options=options,
            environment=environment,
        )


@contextmanager
def rig(registry: Path) -> Iterator[Rig]:
    """Start, hand over, stop, remove. A broker that is gone by then is no error."""
    folder = Path(tempfile.mkdtemp(prefix="tailrace-bench-"))
    try:
        with LocalRedis(folder / "redis") as redis, LocalKafka(folder / "kafka") as kafka:
            ensure_topics(kafka.bootstrap)
            yield Rig(folder, kafka, redis, registry.resolve())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
