"""INFERENCE_* in the environment. What does not parse is refused, and so is a name we do not know."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from inference.batcher import BatcherLimits
from inference.buckets import BATCHES, CANDIDATES, HISTORIES, Buckets
from inference.engines.base import EngineOptions, Precision

Sizes = Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(min_length=1, max_length=16)]


class InferenceSettings(BaseSettings):
    """How lists are computed. Tuples are given as JSON: INFERENCE_HISTORIES='[25, 50, 100]'."""

    model_config = SettingsConfigDict(env_prefix="INFERENCE_", frozen=True)

    engine: Literal["auto", "openvino", "onnx", "torch", "numpy"] = "auto"
    precision: Precision = "f32"
    provider: str = "CPUExecutionProvider"
    device: str = "CPU"
    threads: Annotated[int, Field(ge=1, le=256)] = 1

    histories: Sizes = HISTORIES
    candidate_sizes: Sizes = CANDIDATES
    batches: Sizes = BATCHES

    runners: Annotated[int, Field(ge=1, le=64, description="threads that rank, each with an engine")] = 2
    max_batch: Annotated[int, Field(ge=1, le=1024)] = 32
    max_queue: Annotated[int, Field(ge=1)] = 2_048
    wait_ms: Annotated[float, Field(ge=0, le=100)] = 0.0
    spread_ms: Annotated[float, Field(ge=0, le=1000)] = 25.0

    retrieved: Annotated[int, Field(ge=1, le=1000, description="items from the model per user")] = 100
    exact_until: Annotated[int, Field(ge=0, description="items searched exactly; IVF beyond")] = 20_000
    probes: Annotated[int, Field(ge=1, description="IVF lists searched per user")] = 16

    @model_validator(mode="after")
    def _buckets_are_valid(self) -> Self:
        self.buckets()
        return self

    def buckets(self) -> Buckets:
        return Buckets(histories=self.histories, candidates=self.candidate_sizes, batches=self.batches)

    def engine_options(self) -> EngineOptions:
        return EngineOptions(self.threads, self.precision, self.provider, self.device)

    def batcher_limits(self) -> BatcherLimits:
        return BatcherLimits(self.max_batch, self.max_queue, self.wait_ms, self.spread_ms)
