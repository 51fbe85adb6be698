"""Every topic, one row each. Names live here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from topics.messages import BehaviorEvent, Message, ModelReleased, Recommendation, RecommendRequest

DAY_MS = 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class Topic:
    """What `topics.admin` creates. `value` is None where original bytes are kept untouched."""

    name: str
    value: type[Message] | None
    key: str
    partitions: int
    about: str
    config: dict[str, str] = field(default_factory=dict)


CLICKS = Topic(
    "clicks",
    BehaviorEvent,
    "user id",
    8,
    "the log of record; sequences can be rebuilt from it",
    {"retention.ms": str(30 * DAY_MS)},
)
REQUESTS = Topic(
    "recommendation-requests",
    RecommendRequest,
    "user id",
    8,
    "asking for a list without a click",
    {"retention.ms": str(DAY_MS)},
)
RECOMMENDATIONS = Topic(
    "recommendations",
    Recommendation,
    "user id",
    8,
    "ranked lists; the same click always carries the same recommendation id",
    {"retention.ms": str(7 * DAY_MS)},
)
DEAD_LETTERS = Topic(
    "clicks.dead-letter",
    None,
    "original key",
    1,
    "original bytes untouched; headers carry reason, topic, partition, offset, attempts",
    {"retention.ms": str(30 * DAY_MS), "max.message.bytes": str(16 * 1024 * 1024)},
)
RELEASES = Topic(
    "model-releases",
    ModelReleased,
    "release alias",
    1,
    "which version of the model serves",
    {"cleanup.policy": "compact"},
)

TOPICS: tuple[Topic, ...] = (CLICKS, REQUESTS, RECOMMENDATIONS, DEAD_LETTERS, RELEASES)


def suffixed(suffix: str) -> list[Topic]:
    """The catalogue for an environment of its own on a shared broker: `.staging`, say."""
    return [replace(topic, name=topic.name + suffix) for topic in TOPICS]
