"""INFERENCE_* in the environment. What does not parse is refused, and so is a name we do not know."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from compression.releases.registry import Manifest
from inference.batcher import BatcherLimits
from inference.buckets import BATCHES, CANDIDATES, HISTORIES, Buckets
from inference.engines import AUTO, names
from inference.engines.base import EngineOptions, Precision
from inference.lanes import LaneSpec, parse_lanes

Sizes = Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(min_length=1, max_length=16)]


class InferenceSettings(BaseSettings):
    """How lists are computed. Tuples are given as JSON: INFERENCE_HISTORIES='[25, 50, 100]'."""

    model_config = SettingsConfigDict(env_prefix="INFERENCE_", frozen=True)

    engine: str = "auto"
    precision: Precision = "f32"
    provider: str = "CPUExecutionProvider"
    device: str = "CPU"
    threads: Annotated[int, Field(ge=1, le=256)] = 1

    histories: Sizes = HISTORIES
    candidate_sizes: Sizes = CANDIDATES
    batches: Sizes = BATCHES

    runners: Annotated[int, Field(ge=1, le=64, description="threads that rank, each with an engine")] = 2
    lanes: Annotated[str, Field(max_length=4096, description="unlike engines side by side")] = ""
    """Instead of `runners` times `engine`, as `inference.lanes` reads it."""
    spares: Annotated[int, Field(ge=0, le=16, description="warmed engines in reserve, per kind")] = 1
    max_batch: Annotated[int, Field(ge=1, le=1024)] = 32
    max_queue: Annotated[int, Field(ge=1)] = 2_048
    wait_ms: Annotated[float, Field(ge=0, le=100)] = 0.0
    spread_ms: Annotated[float, Field(ge=0, le=1000)] = 25.0
    hang_ms: Annotated[float, Field(ge=10, le=600_000, description="a batch without an answer")] = 1_000.0

    retrieved: Annotated[int, Field(ge=1, le=1000, description="items from the model per user")] = 100
    exact_until: Annotated[int, Field(ge=0, description="items searched exactly; IVF beyond")] = 20_000
    probes: Annotated[int, Field(ge=1, description="IVF lists searched per user")] = 16

    fusion: Annotated[
        float, Field(ge=0, le=100, description="times the manifest's weights of online counts; 0: none")
    ] = 1.0

    history_hop: Annotated[
        int, Field(ge=0, le=4096, description="events by which a full history may start later; 0: none")
    ] = 50
    """So that it mostly starts where it did a click ago, and the click is appended (`features.anchor`)."""

    cache_mb: Annotated[float, Field(ge=0, description="encoded histories kept, MiB a version; 0: none")] = (
        64.0
    )

    @model_validator(mode="after")
    def _buckets_are_valid(self) -> Self:
        self.buckets()
        for spec in self.lane_specs():
            if spec.engine not in (AUTO, *names()):
                raise ValueError(f"no engine is called {spec.engine!r}; there are {', '.join(names())}")
        return self

    def hop_of(self, manifest: Manifest, longest: int) -> int:
        """By how many events a version's histories of at most so many may start later. Whose events cannot be
        appended is shown all there are."""
        return min(self.history_hop, longest // 2) if "append" in manifest.graphs else 0

    def buckets(self) -> Buckets:
        return Buckets(histories=self.histories, candidates=self.candidate_sizes, batches=self.batches)

    def engine_options(self) -> EngineOptions:
        return EngineOptions(self.threads, self.precision, self.provider, self.device)

    def lane_specs(self) -> list[LaneSpec]:
        return parse_lanes(self.lanes or f"{self.engine}*{self.runners}", self.engine_options())

    def batcher_limits(self) -> BatcherLimits:
        return BatcherLimits(self.max_batch, self.max_queue, self.wait_ms, self.spread_ms, self.hang_ms)
