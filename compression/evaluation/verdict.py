"""What the gate is asked with and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from compression.evaluation.scoring import Scorer
from features.encoding import Vocabulary

Outcome = Literal["passed", "refused", "skipped"]


class GateLimits(BaseSettings):
    """GATE_… in the environment. `margin` is a share of the serving version's NDCG@10, `teacher_loss` of
    that of the network before it was compressed."""

    model_config = SettingsConfigDict(env_prefix="GATE_", frozen=True, extra="ignore")

    margin: Annotated[float, Field(ge=0, le=1)] = 0.02
    teacher_loss: Annotated[float, Field(ge=0, le=1)] = 0.01
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    targets: Annotated[int, Field(ge=1)] = 2_000
    latency_ms: Annotated[float, Field(gt=0)] = 50.0
    max_bytes: Annotated[int, Field(ge=1)] = 2 * 2**30
    recent_known: Annotated[float, Field(ge=0, le=1)] = 0.8
    served_known: Annotated[float, Field(ge=0, le=1)] = 0.5


class Check(BaseModel):
    """One thing that was looked at: a figure, what it was held against, and a sentence."""

    model_config = ConfigDict(frozen=True)

    name: str
    outcome: Outcome
    value: float | None = None
    limit: float | None = None
    detail: str
    figures: dict[str, float] = {}


class Verdict(BaseModel):
    """All checks. `forced`: it was published although a check refused."""

    model_config = ConfigDict(frozen=True)

    against: str | None
    checks: list[Check]
    forced: bool = False

    @property
    def passed(self) -> bool:
        return not self.refusals

    @property
    def refusals(self) -> list[str]:
        return [f"{check.name}: {check.detail}" for check in self.checks if check.outcome == "refused"]


class GateRefused(RuntimeError):
    """The version is not published; the message says for which reasons."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__("the gate refuses this version: " + "; ".join(verdict.refusals))
        self.verdict = verdict


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """A version with what is needed to ask it about a log."""

    scorer: Scorer
    vocabulary: Vocabulary
    max_history: int
