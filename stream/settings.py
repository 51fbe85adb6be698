"""Settings of the stream worker, from STREAM_* in the environment. Wrong values stop the start."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from inference.admission.load import processors
from inference.releases.settings import ReleaseRules
from topics.catalog import suffixed


class TopicNames(NamedTuple):
    """The catalogue's names as this deployment has them."""

    clicks: str
    requests: str
    recommendations: str
    dead_letters: str
    releases: str

    @classmethod
    def with_suffix(cls, suffix: str = "") -> TopicNames:
        return cls(*(topic.name for topic in suffixed(suffix)))


class StreamSettings(BaseSettings):
    """One worker's settings. Times carry their unit in the name."""

    model_config = SettingsConfigDict(env_prefix="STREAM_", frozen=True, extra="ignore")

    bootstrap: str = "localhost:9092"
    redis_url: str = "redis://localhost:6379/0"
    registry: str = ".tailrace/models"
    alias: str = "serving"
    group: str = Field(default="tailrace", min_length=1, max_length=200)
    topic_suffix: str = Field(default="", pattern=r"^[A-Za-z0-9._-]{0,64}$")
    """Appended to every topic's name: `.staging` keeps an environment of its own on one broker."""

    instance_id: str = Field(default_factory=socket.gethostname, min_length=1, max_length=200)
    """Static group membership (KIP-345): a worker that comes back under the same id within
    `session_timeout_ms` takes its partitions back without a rebalance. One live worker per id."""

    http_host: str = "127.0.0.1"
    http_port: int = Field(default=6066, ge=0, le=65535)

    trigger: Literal["click", "user"] = "click"
    """`click`: a list for every click. `user`: clicks of one user that are in hand together share
    one list, which names them all."""

    k: int = Field(default=10, ge=1, le=1000)
    poll_max_records: int = Field(default=256, ge=1)
    max_in_flight: int = Field(default=1024, ge=1)
    """Records in hand and not yet answered; polling stops there and lag grows instead of memory."""
    gather_units: int = Field(default_factory=processors, ge=1)
    """With so many units in hand a poll waits until one is answered: more at once would only share the
    processors, and what comes meanwhile makes one unit. Unset: as many as processors."""
    gather_ms: int = Field(default=25, ge=0)
    """The most that a poll waits for that; units that hang hold up the next by no more."""

    click_deadline_ms: int = Field(default=2000, ge=1)
    """A click not ranked this long after it was read gets a degraded list at once."""

    check_requests: int = Field(default=64, ge=0, le=10_000)
    """So many recent requests a version has to rank before it serves; 0 asks for none."""

    keep_previous: int = Field(default=1, ge=0, le=1)
    """Versions before the serving one that stay open, so that a rollback takes effect at once."""

    alias_poll_s: float = Field(default=2.0, ge=0, le=3600)
    """How often the alias is looked at, so that a change which nobody announced is noticed; 0: never."""

    commit_interval_ms: int = Field(default=500, ge=10)
    session_timeout_ms: int = Field(default=10_000, ge=6_000)
    drain_timeout_ms: int = Field(default=10_000, ge=0)
    """On SIGTERM and at a rebalance: how long work in hand may take before it is left to the next
    owner (who answers it again, with the same ids)."""

    close_timeout_ms: int = Field(default=10_000, ge=0)
    """After the drain: how long closing may take before the process ends hard, with code 75."""

    stall_ms: int = Field(default=60_000, ge=1_000)
    """/healthz fails when records wait and nothing has been answered for this long."""

    retry_min_ms: int = Field(default=50, ge=1)
    retry_max_ms: int = Field(default=1_000, ge=1)
    max_value_bytes: int = Field(default=64 * 1024, ge=256)
    remembered_lists: int = Field(default=20_000, ge=0)
    """Users whose last list is kept in process, to answer with when nothing better can be had."""

    flush_interval_ms: int = Field(default=500, ge=10)
    """Item statistics are written to Redis this often."""

    @property
    def releases(self) -> ReleaseRules:
        return ReleaseRules(
            registry=Path(self.registry),
            alias=self.alias,
            check_requests=self.check_requests,
            check_limit_s=self.click_deadline_ms / 1000,
            keep_previous=bool(self.keep_previous),
        )

    @property
    def topics(self) -> TopicNames:
        return TopicNames.with_suffix(self.topic_suffix)
