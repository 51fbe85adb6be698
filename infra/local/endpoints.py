"""Where Kafka and Redis are: the environment first, then what `tailrace up` started, then the defaults."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from infra.local.paths import local_dir

DEFAULT_BOOTSTRAP = "localhost:9092"
DEFAULT_REDIS_URL = "redis://localhost:6379/0"


@dataclass(frozen=True, slots=True)
class Endpoints:
    """`bootstrap` is Kafka's host:port list, `redis_url` includes the database number."""

    bootstrap: str
    redis_url: str


def endpoints() -> Endpoints:
    """Each address by itself: $TAILRACE_BOOTSTRAP and $TAILRACE_REDIS_URL win over the state file."""
    recorded = _recorded()
    return Endpoints(
        bootstrap=os.environ.get("TAILRACE_BOOTSTRAP") or recorded.get("bootstrap", DEFAULT_BOOTSTRAP),
        redis_url=os.environ.get("TAILRACE_REDIS_URL") or recorded.get("redis_url", DEFAULT_REDIS_URL),
    )


def state_file() -> Path:
    return local_dir() / "state.json"


def _recorded() -> dict[str, str]:
    path = state_file()
    if not path.is_file():
        return {}
    state: dict[str, str] = json.loads(path.read_text())
    return state
