"""Message types: one frozen pydantic model per topic.

A message is checked once, where its bytes enter (`topics.codec`), and trusted afterwards.
Types are strict: a number sent as a string is an error, not a guess.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer

MAX_ID = 2**63 - 1
MAX_LIST = 1_000
MAX_TIMESTAMP_S = 2**32 - 1

Behavior = Literal["pv", "cart", "fav", "buy"]
BEHAVIORS: tuple[Behavior, ...] = ("pv", "cart", "fav", "buy")

Source = Literal["retrieval", "transition", "recent", "category", "popular", "request"]
Degradation = Literal["cached", "popular"]
Stage = Literal["serving", "canary", "shadow", "retired", "rolled_back"]

EntityId = Annotated[int, Field(ge=0, le=MAX_ID)]
Label = Annotated[str, Field(min_length=1, max_length=128)]
ListSize = Annotated[int, Field(ge=1, le=MAX_LIST)]


class Message(BaseModel):
    """Base of every message: immutable, strict, unknown fields ignored (a newer producer may add)."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class BehaviorEvent(Message):
    """One thing a user did with one item. The record key is the user id in decimal."""

    event_id: Label
    user_id: EntityId
    item_id: EntityId
    category_id: EntityId
    behavior: Behavior
    timestamp: Annotated[int, Field(gt=0, le=MAX_TIMESTAMP_S, description="Unix seconds")]


class RecommendRequest(Message):
    """Asking for a ranked list without a click."""

    request_id: Label
    user_id: EntityId
    k: ListSize = 10
    candidates: Annotated[list[EntityId], Field(max_length=MAX_LIST)] | None = None
    exclude: Annotated[list[EntityId], Field(max_length=MAX_LIST)] = []
    priority: Literal["high", "normal", "low"] = "normal"
    deadline_ms: Annotated[int, Field(ge=1, le=60_000)] | None = None


class RankedItem(Message):
    """One line of a ranked list; `source` names where the candidate came from. `score` orders the list it
    stands in: the model's logit plus what online counts add. Scores of two lists do not compare."""

    item_id: EntityId
    score: float
    source: Source


class AnsweredClick(Message):
    """The click, by its place in the log, that a list answers."""

    event_id: str
    item_id: EntityId
    topic: str
    partition: int
    offset: int


class Trigger(Message):
    """What a list answers: one click, several coalesced clicks of one user, or a request."""

    kind: Literal["click", "request"]
    clicks: list[AnsweredClick] = []
    request_id: str | None = None


class Recommendation(Message):
    """A ranked list, best first.

    `recommendation_id` is a function of the triggering record's topic, partition and offset: the
    same click always carries the same id. A consumer keeps the latest list per id: a repeated list
    is the same answer again, and a ranked list may follow a degraded one.
    """

    recommendation_id: str
    user_id: EntityId
    trigger: Trigger
    items: list[RankedItem]
    model_version: str
    engine: str
    degraded: Degradation | None = None
    timings_ms: dict[str, float] = {}
    generated_at: Annotated[float, Field(description="Unix seconds")]


class ModelReleased(Message):
    """A version of the model has changed stage. The record key is the release alias.

    It says when to look; what serves is what the registry's alias says by then. `traffic_percent` is
    the canary's share of users, or the shadow's of requests.
    """

    version: Label
    uri: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="of the manifest")]
    stage: Stage
    traffic_percent: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 100

    @field_serializer("traffic_percent")
    def _whole_where_it_is(self, percent: float) -> int | float:
        # Readers from before there were fractions take whole numbers only.
        return int(percent) if percent == int(percent) else percent
