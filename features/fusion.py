"""How much what is counted online adds to the score of a candidate.

    score = the network's + transition × Σ share of users who went there × 0.8 per event back
                          + recent     × Σ 0.97 per event back, of the user's own events on the item
                          + category   × popularity within a recent category × 0.7 per category back
                          + popular    × popularity

The sums are those of `features.candidates`, without their weights there. The numbers are chosen on
validation when a model is trained (`compression.evaluation.fusion`) and travel in its manifest.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

MOST: Final = 1_000.0
Weight = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]


class Fusion(BaseModel):
    """One weight per source of evidence; the network's scores are logits."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    transition: Weight = 0.0
    recent: Weight = 0.0
    category: Weight = 0.0
    popular: Weight = 0.0

    def __bool__(self) -> bool:
        """Whether anything is added at all."""
        return any((self.transition, self.recent, self.category, self.popular))

    def times(self, factor: float) -> Fusion:
        """So much of each, none above what a weight may be."""
        return Fusion(**{name: min(MOST, factor * weight) for name, weight in self.model_dump().items()})
