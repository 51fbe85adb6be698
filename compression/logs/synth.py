"""A synthetic log in Taobao's format with something to learn in it. Seeded; vectorised.

Items have power-law popularity and belong to categories. A user stays in one category for a session of
a few events and then drifts to another, usually one of the few next to it. Inside a category the next
item is, most of the time, one of a handful of successors of the last: that is what a model can learn
and popularity cannot. Users come back to items they saw. Events are in event-time order.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import numpy as np
import numpy.typing as npt

from topics.messages import BEHAVIORS

START_S: Final = 1_511_539_200  # 2017-11-25 00:00, UTC+8: where the real log begins
DAYS: Final = 9
BEHAVIOR_SHARES: Final = (0.90, 0.06, 0.03, 0.01)
_ROWS_AT_ONCE: Final = 200_000

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SynthSettings:
    """The world to draw from. The shares say what the next event of a user is."""

    events: int = 200_000
    users: int = 5_000
    items: int = 5_000
    categories: int = 100
    seed: int = 1
    stay: float = 0.85  # in the category of the event before
    follow: float = 0.70  # of those who stay: one of the last item's successors
    revisit: float = 0.08  # an item seen a few events ago
    successors: int = 4

    def __post_init__(self) -> None:
        for name in ("events", "users", "items", "categories"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.categories > self.items:
            raise ValueError(f"{self.categories} categories need at least as many items")


@dataclass(frozen=True, slots=True, eq=False)
class SynthLog:
    """Columns of a log, in event-time order; behaviours are codes."""

    users: Int64
    items: Int64
    categories: Int64
    behaviors: Int64
    timestamps: Int64


def synthesize(settings: SynthSettings) -> SynthLog:
    """Draw a log. All users take their n-th step together, so the loop is over steps, not events."""
    rng = np.random.default_rng(settings.seed)
    world = _World(settings, rng)
    lengths = _history_lengths(settings, rng)
    order = np.argsort(-lengths, kind="stable")
    lengths = lengths[order]
    steps = int(lengths.max())
    offsets = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    items = np.empty(settings.events, np.int64)
    home = world.draw_category(rng, len(lengths))
    current = world.draw_item(rng, home)
    recent = np.repeat(current[:, None], 8, axis=1)
    for step in range(steps):
        active = int(np.searchsorted(-lengths, -step))
        current, recent = current[:active], recent[:active]
        if step:
            current = world.next_item(rng, current, recent)
        recent[:, step % recent.shape[1]] = current
        items[offsets[:active] + step] = current
    users = np.repeat(order, lengths)
    timestamps = _timestamps(lengths, rng)
    by_time = np.argsort(timestamps, kind="stable")
    return SynthLog(
        users=_scattered(settings.users, rng)[users[by_time]],
        items=world.item_ids[items[by_time]],
        categories=world.category_ids[world.category_of[items[by_time]]],
        behaviors=rng.choice(len(BEHAVIORS), settings.events, p=BEHAVIOR_SHARES),
        timestamps=timestamps[by_time],
    )


def write_log(path: Path, log: SynthLog) -> None:
    """As .csv, or gzip where the name ends in .gz. No header, as the original."""
    with path.open("wb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile("", "wb", 3, raw, mtime=0) as packed:
                _write_rows(packed, log)
        else:
            _write_rows(raw, log)


def _write_rows(file: IO[bytes] | gzip.GzipFile, log: SynthLog) -> None:
    for start in range(0, len(log.users), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        lines = [
            f"{user},{item},{category},{BEHAVIORS[behavior]},{timestamp}\n"
            for user, item, category, behavior, timestamp in zip(
                log.users[rows].tolist(),
                log.items[rows].tolist(),
                log.categories[rows].tolist(),
                log.behaviors[rows].tolist(),
                log.timestamps[rows].tolist(),
                strict=True,
            )
        ]
        file.write("".join(lines).encode())


class _World:
    """Items, their categories and successors. Items of a category are numbered together, the most
    popular first."""

    def __init__(self, settings: SynthSettings, rng: np.random.Generator) -> None:
        self.settings = settings
        sizes = 1 + rng.multinomial(
            settings.items - settings.categories, _power_law(settings.categories, 0.8)
        )
        self.sizes = sizes
        self.starts = np.concatenate([[0], np.cumsum(sizes)])[:-1]
        self.category_of = np.repeat(np.arange(settings.categories), sizes)
        self.category_cdf = np.cumsum(_power_law(settings.categories, 0.9))
        place = rng.integers(0, sizes[self.category_of][:, None], (settings.items, settings.successors))
        self.successors = self.starts[self.category_of][:, None] + place
        self.near = rng.integers(0, settings.categories, (settings.categories, 3))
        self.item_ids = _scattered(settings.items, rng)
        self.category_ids = _scattered(settings.categories, rng)

    def draw_category(self, rng: np.random.Generator, count: int) -> Int64:
        drawn = np.searchsorted(self.category_cdf, rng.random(count))
        return np.minimum(drawn, self.settings.categories - 1)

    def draw_item(self, rng: np.random.Generator, category: Int64) -> Int64:
        """Log-uniform over the ranks of the category: popularity falls as one over the rank."""
        size = self.sizes[category]
        rank = (np.power(size + 1.0, rng.random(len(category))) - 1).astype(np.int64)
        return np.asarray(self.starts[category] + np.minimum(rank, size - 1), np.int64)

    def next_item(self, rng: np.random.Generator, last: Int64, recent: Int64) -> Int64:
        settings, count = self.settings, len(last)
        chance = rng.random(count)
        stays = chance < settings.stay
        follows = rng.random(count) < settings.follow
        category = self.category_of[last]
        near = self.near[category, rng.integers(0, self.near.shape[1], count)]
        strays = np.where(rng.random(count) < 0.7, near, self.draw_category(rng, count))
        drawn = self.draw_item(rng, np.where(stays, category, strays))
        # The first successor is the likeliest: shares fall by half.
        choice = np.minimum(rng.geometric(0.5, count) - 1, settings.successors - 1)
        followed = self.successors[last, choice]
        revisited = recent[np.arange(count), rng.integers(0, recent.shape[1], count)]
        chosen = np.where(stays & follows, followed, drawn)
        return np.where(rng.random(count) < settings.revisit, revisited, chosen)


def _power_law(count: int, exponent: float) -> npt.NDArray[np.float64]:
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return np.asarray(weights / weights.sum())


def _history_lengths(settings: SynthSettings, rng: np.random.Generator) -> Int64:
    """How many events each user has; they add up to the number asked for."""
    activity = rng.lognormal(0.0, 0.8, settings.users)
    return np.asarray(rng.multinomial(settings.events, activity / activity.sum()), np.int64)


def _timestamps(lengths: Int64, rng: np.random.Generator) -> Int64:
    """Sessions spread over the days, busier in the evening; seconds to minutes between their events."""
    total = int(lengths.sum())
    first = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    first = first[lengths > 0]
    new_session = rng.random(total) < 0.12
    new_session[first] = True
    session = np.cumsum(new_session) - 1
    of_user = np.repeat(np.arange(len(lengths)), lengths)[new_session]
    hour = (rng.normal(21.0, 4.5, len(of_user)) % 24.0) * 3600
    start = rng.integers(0, DAYS, len(of_user)) * 86_400 + hour
    start = start[np.lexsort((start, of_user))].astype(np.int64)
    gap = np.where(new_session, 0, 1 + rng.exponential(40.0, total)).astype(np.int64)
    within = np.cumsum(gap)
    stamp = START_S + start[session] + within - within[new_session][session]
    # Long sessions may run into the next one: a user's events keep their order.
    rank = np.repeat(np.arange(len(lengths)), lengths) * (10**9)
    return np.asarray(np.maximum.accumulate(stamp - START_S + rank) - rank + START_S, np.int64)


def _scattered(count: int, rng: np.random.Generator) -> Int64:
    """Ids as a shop has them: distinct, in no order, with gaps."""
    return rng.permutation(np.arange(1, count + 1) * 13 + rng.integers(0, 13, count))
