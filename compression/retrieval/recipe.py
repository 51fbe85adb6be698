"""How to train for retrieval: the network's sizes, the optimizer's numbers, when to stop.

A recipe is one of the names in `RECIPES` or a JSON file with some of the fields; `base` in a file names
the recipe the rest is taken from.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compression.files import read_plain
from compression.retrieval.network import NetworkConfig

MAX_RECIPE_BYTES: Final = 2**16
LIMITS: Final = {"epochs", "max_core_minutes", "patience"}
OF_THE_WHOLE: Final = {"members", "fused_counts", "fused_weights"}
_SHARED: Final = OF_THE_WHOLE | {"max_items", "max_history"}
_LATER: Final = ("start", "prefixes", "lateness", "categories", "recency", "seen")
Counts = Literal["dense", "sparse", "walked", "combined"]
Weight = Annotated[float, Field(ge=0, le=100)]


class RecipeInvalid(ValueError):
    """A recipe that cannot be trained by; the message says which field and why."""


class RetrievalRecipe(BaseModel):
    """All that decides a training but the log and the seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dim: int = 64
    layers: int = 2
    heads: int = 1
    ffn: int = 256
    activation: Literal["gelu", "relu", "swiglu"] = "gelu"
    max_history: int = 200
    positions: bool = True
    lateness: bool = False
    categories: bool = False
    reach: bool = True
    behaviors: bool = False
    gaps: bool = False
    dropout: float = 0.1

    start: Literal["normal", "counts"] = "normal"
    """What the item table starts from: numbers drawn, or the counts' factors (`spectral.py`)."""
    recency: float = 0.0
    """Attention starts as a mean of the events so far, weighed (1 + events back)^-recency and brought along
    as they are (`RetrievalNetwork.start_with_recent`); 0: as next to nothing."""
    prefixes: bool = False
    """Every training event is the one target of a window of its own, as in a question: the position next to
    the end is always the newest event's, and noise is drawn anew for each target."""
    max_items: Annotated[int, Field(ge=1)] = 500_000
    full_softmax_items: Annotated[int, Field(ge=0)] = 20_000
    negatives: Annotated[int, Field(ge=2)] = 3_000
    event_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """So much of every window is left out, other events each time: the next but one is foretold, too."""
    batch_windows: Annotated[int, Field(ge=1)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    bf16: bool = True
    """Where the processor multiplies bfloat16 itself."""

    epochs: Annotated[int, Field(ge=1)] = 100
    max_core_minutes: Annotated[float, Field(gt=0)] = 115.0
    """Of processor time, all cores together: 120 are an hour of two cores."""
    patience: Annotated[int, Field(ge=1)] = 12
    """So many epochs without a better validation end the training."""
    judge_every: Annotated[int, Field(ge=1)] = 1
    judge_limit: Annotated[int, Field(ge=1)] = 10_000
    seen: Literal["filtered", "ranked"] = "filtered"
    """Whether validation asks for items that the user had before, too: where people come back."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Per step: what is judged and kept is this running mean of the weights; 0 the weights themselves."""
    averaged: Annotated[int, Field(ge=1, le=16)] = 5
    """The weights of so many of the best epochs are averaged, where validation likes that better."""

    counts: Counts | None = "dense"
    """Settings of the transition counts that a network is judged and fused with; None: alone."""
    fused_counts: Counts | None = None
    """Others that what is released is fused with."""
    fused_weights: tuple[Weight, ...] | None = None
    """And what weights of theirs are tried, if not the same."""
    fusion_weights: tuple[Weight, ...] = (0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 7.0)
    members: Annotated[tuple[dict[str, Any], ...], Field(min_length=1, max_length=16)] = ({},)
    """A network for each, of this recipe with some fields changed; the mean of their log-chances counts."""

    @model_validator(mode="after")
    def _members_differ_as_networks(self) -> RetrievalRecipe:
        for fields in self.members:
            if wrong := sorted(set(fields) - set(type(self).model_fields) | set(fields) & _SHARED):
                raise ValueError(f"{', '.join(wrong)} cannot be changed in a member")
        return self

    def of_members(self) -> list[RetrievalRecipe]:
        """How each network is trained, itself a recipe of one network."""
        whole = self.model_dump(exclude=OF_THE_WHOLE)
        return [RetrievalRecipe.model_validate(whole | fields) for fields in self.members]

    def fused(self) -> RetrievalRecipe:
        """With the counts and weights of what is released in the place of those of its trainings."""
        counts, weights = self.fused_counts or self.counts, self.fused_weights or self.fusion_weights
        return self.model_copy(update={"counts": counts, "fusion_weights": weights})

    def trains(self) -> dict[str, Any]:
        """All of it but how long: trainings that agree in this go the same way, one further."""
        fields = type(self).model_fields
        # Older states know nothing of these.
        later = {name for name in _LATER if getattr(self, name) == fields[name].default}
        return self.model_dump(mode="json", exclude=LIMITS | OF_THE_WHOLE | later)

    def digest(self) -> str:
        """Eight letters that a recipe which trains otherwise does not share, for names of folders."""
        return hashlib.sha256(orjson.dumps(self.trains())).hexdigest()[:8]

    def network(self, item_rows: int, category_rows: int = 0) -> NetworkConfig:
        rows = ("item_rows", "category_rows")
        sizes = {name: getattr(self, name) for name in NetworkConfig.model_fields if name not in rows}
        read = category_rows if self.categories else 0
        return NetworkConfig(**sizes, item_rows=item_rows, category_rows=read)


RECIPES: Final = {
    "ml-1m": RetrievalRecipe(ema=0.998, judge_every=2),
    "beauty": RetrievalRecipe(
        layers=1,
        max_history=50,
        dropout=0.4,
        event_dropout=0.2,
        prefixes=True,
        batch_windows=128,
        start="counts",
        epochs=12,
        patience=4,
        judge_every=2,
        judge_limit=6_000,
        averaged=2,
        counts="walked",
        fusion_weights=(10.0,),
        ema=0.99,
        fused_counts="combined",
        # By the last but one of users fitted without their last three: as far after what was learnt as the
        # test is, where validation asks for what comes right after.
        fused_weights=(7.0,),
        members=({}, {"epochs": 8}),
    ),
    "full": RetrievalRecipe(),
    "laptop": RetrievalRecipe(epochs=20, max_core_minutes=4.0, max_history=100, averaged=3, patience=4),
    # What serves a click by appending it, and people who come back: no positions, no more events than a
    # worker keeps of a user, attention that begins as a mean of recent events, judged with items seen before.
    "stream": RetrievalRecipe(
        positions=False,
        behaviors=True,
        gaps=True,
        recency=1.0,
        seen="ranked",
        counts=None,
        batch_windows=16,
        learning_rate=2e-3,
        epochs=8,
        max_core_minutes=4.0,
        max_history=100,
        judge_limit=2_000,
        averaged=3,
        patience=4,
    ),
}


def load_recipe(name_or_path: str) -> RetrievalRecipe:
    """A recipe by its name, or from a JSON file; `RecipeInvalid` says what is wrong."""
    if name_or_path in RECIPES:
        return RECIPES[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise RecipeInvalid(f"{name_or_path!r} is neither a file nor one of {', '.join(RECIPES)}")
    try:
        fields: Any = orjson.loads(read_plain(path, MAX_RECIPE_BYTES, name_or_path))
    except (ValueError, OSError) as error:
        raise RecipeInvalid(f"{name_or_path}: {error}") from None
    if not isinstance(fields, dict):
        raise RecipeInvalid(f"{name_or_path}: not a JSON object of fields")
    base = fields.pop("base", "full")
    if base not in RECIPES:
        raise RecipeInvalid(f"{name_or_path}: base {base!r} is not one of {', '.join(RECIPES)}")
    return change(RECIPES[base], fields, name_or_path)


def change(recipe: RetrievalRecipe, fields: dict[str, Any], named: str) -> RetrievalRecipe:
    """The recipe with some fields changed, checked anew."""
    try:
        changed = RetrievalRecipe.model_validate(recipe.model_dump() | fields)
        for member in changed.of_members():
            member.network(2)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "members"
        raise RecipeInvalid(f"{named}: {field}: {first['msg']}") from None
    return changed
