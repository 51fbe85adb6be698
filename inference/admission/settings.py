"""ADMISSION_* in the environment. Left alone, nobody's rate is limited."""

from __future__ import annotations

import math
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

_WINDOW_MAX_S = 3600


class Tier(BaseModel):
    """What a service tier may use. None is no limit.

    `rate` lists a second, at most `burst` at once, are shared by all users of the tier and all processes;
    `client_rate` and `client_burst` hold for each user. The shared burst is the window that is counted
    in, so it must be a whole number of seconds of the rate: 100 a second may come 100, 200, 300 at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")
    rate: PositiveFloat | None = Field(default=None, le=1e9)
    burst: PositiveInt | None = Field(default=None, le=10**9)
    client_rate: PositiveFloat | None = Field(default=None, le=1e9)
    client_burst: PositiveInt | None = Field(default=None, le=10**9)

    @property
    def window_s(self) -> int:
        """Within this many seconds at most `most` lists; 0 for a tier without a shared rate."""
        if self.rate is None:
            return 0
        return 1 if self.burst is None else round(self.burst / self.rate)

    @property
    def most(self) -> int:
        return 0 if self.rate is None else round(self.rate * self.window_s)

    @property
    def at_once(self) -> int | None:
        """The client burst in force: what was given, else a second's worth."""
        return None if self.client_rate is None else self.client_burst or math.ceil(self.client_rate)

    @model_validator(mode="after")
    def _limits_are_whole(self) -> Self:
        if self.rate is None and self.burst is not None:
            raise ValueError(f"{self.name}: a burst needs a rate")
        if self.client_rate is None and self.client_burst is not None:
            raise ValueError(f"{self.name}: a client_burst needs a client_rate")
        if self.rate is None:
            return self
        used = self.rate * self.window_s
        if not 1 <= self.window_s <= _WINDOW_MAX_S or abs(used - (self.burst or round(used))) > 1e-6 * used:
            raise ValueError(
                f"{self.name}: the burst must be a whole number of seconds (1 to {_WINDOW_MAX_S}) of the "
                f"rate, and {self.burst or 'one second'} of {self.rate:g} a second is not"
            )
        return self


class AdmissionSettings(BaseSettings):
    """Who is let in. Tiers come as JSON, the lowest first:
    ADMISSION_TIERS='[{"name":"free","rate":200,"client_rate":1},{"name":"premium"}]'."""

    model_config = SettingsConfigDict(env_prefix="ADMISSION_", frozen=True, extra="ignore")

    tiers: Annotated[tuple[Tier, ...], Field(min_length=1, max_length=16)] = (
        Tier(name="free"),
        Tier(name="standard"),
        Tier(name="premium"),
    )
    default_tier: str = "standard"
    """The tier of a user whom nobody put into one (`tailrace tiers set`), or into one not listed here."""

    shared: bool = True
    """Whether processes share a tier's rate through Redis; without, each has the whole rate."""
    lease_ms: int = Field(default=100, ge=10, le=10_000)
    """How often a process takes tokens of a limited tier from the shared rate."""
    lease_share: float = Field(default=0.25, gt=0, le=1)
    """The most of a tier's burst that one process keeps in hand."""
    lease_timeout_ms: int = Field(default=200, ge=1)
    clients_kept: int = Field(default=65_536, ge=64, le=2**24)
    """Users whose own rate is remembered; past that, those who used least of it are forgotten."""

    adaptive: bool = True
    floor: int = Field(default=32, ge=1)
    """Lists in hand that are let in however long they wait."""
    ceiling: int | None = Field(default=None, ge=1)
    """Lists in hand that are never exceeded; unset, what the worker may read ahead."""
    queue_target_ms: float | None = Field(default=None, gt=0)
    """How long lists may wait for an engine before fewer are let in; unset, half of
    STREAM_CLICK_DEADLINE_MS: what would be late is told so at once and not at its deadline."""
    lag_target_ms: float = Field(default=500.0, gt=0)
    """The same for how late the event loop runs its timers."""
    cpu_high: float = Field(default=0.9, ge=0, lt=1)
    """Above this share of the processors busy, the limit rises more slowly, to a tenth at all of them."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        names = [tier.name for tier in self.tiers]
        if len(set(names)) < len(names):
            raise ValueError(f"a tier is named twice: {', '.join(names)}")
        if self.default_tier not in names:
            raise ValueError(f"the default tier {self.default_tier!r} is none of {', '.join(names)}")
        return self
