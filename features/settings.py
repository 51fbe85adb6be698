"""Settings of the feature store, statistics and candidates, from FEATURES_* in the environment."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat
from pydantic_settings import BaseSettings, SettingsConfigDict

from features import keys
from features.sequence import MAX_EVENTS

SeenFilter = Literal["none", "bought", "seen"]


class FeatureSettings(BaseSettings):
    """One process's settings. Wrong values stop the start."""

    model_config = SettingsConfigDict(env_prefix="FEATURES_", frozen=True, extra="ignore")

    store_timeout_ms: int = Field(default=100, ge=1)
    """The most a call of the store may take, connecting included; there are no hidden retries."""
    breaker_failures: int = Field(default=3, ge=1)
    breaker_open_ms: int = Field(default=500, ge=1)

    sequence_events: int = Field(default=MAX_EVENTS, ge=1, le=MAX_EVENTS)
    sequence_ttl_s: int = Field(default=keys.SEQUENCE_TTL_S, ge=1)
    sequence_max_age_s: int = Field(default=keys.SEQUENCE_MAX_AGE_S, ge=1)

    popularity_half_life_s: float = Field(default=12 * 3600.0, gt=0)
    transition_half_life_s: float = Field(default=7 * 86400.0, gt=0)
    behavior_weights: tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat] = (1.0, 3.0, 3.0, 5.0)
    """What a pv, cart, fav and buy add to popularity and to transitions."""
    statistics_cached: int = Field(default=200_000, ge=1)
    """Item lists, and as many category lists at most, kept in the process."""
    statistics_fresh_ms: int = Field(default=10_000, ge=1)
    statistics_reads: int = Field(default=256, ge=1)
    """The most lists read together with one batch of clicks."""
    transition_limit: int = Field(default=32, ge=1)
    category_limit: int = Field(default=48, ge=1)
    popular_limit: int = Field(default=120, ge=1)
    flush_increments: int = Field(default=512, ge=1)
    """Increments written in one round trip; more make several, so none holds the loop, or Redis, for long."""
    pending_max: int = Field(default=200_000, ge=1)
    """Increments kept while the store is away; past that new ones are dropped and counted."""

    candidate_limit: int = Field(default=50, ge=1, le=1000)
    category_cap: int = Field(default=20, ge=1)
    seen_filter: SeenFilter = "bought"
    recent_events: int = Field(default=MAX_EVENTS, ge=0, le=MAX_EVENTS)
    """How many of the newest events give recent items."""
    transition_events: int = Field(default=10, ge=0, le=MAX_EVENTS)
    """From how many of the newest events transitions start."""
    recent_categories: int = Field(default=3, ge=0)
