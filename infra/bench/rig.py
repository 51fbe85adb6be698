"""A broker, a Redis and workers of a measurement's own, in a temporary folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from infra.local.kafka import LocalKafka
from infra.local.redis import LocalRedis
from infra.local.worker import LocalWorker
from topics.admin import ensure_topics


@dataclass(frozen=True, slots=True)
class Rig:
    """Running Kafka and Redis with the catalogue's topics."""

    folder: Path
    kafka: LocalKafka
    redis: LocalRedis
    registry: Path

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
