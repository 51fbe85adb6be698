"""What users of a site ask for, the same for every arm: a list at every click, with the history as of it.

Sessions begin at clicks drawn from a log, so a history is as long as that of somebody who clicks is, and
go on for a few clicks: each adds one event. Equally many are active at any time, in a new order at each
turn, so that about as many others come between two clicks of one user; and at each turn equally many leave
and somebody new comes, as sessions of different people do not begin together: also where the lists are asked
for over again, whose first sessions go on where the last ones were. So many follow one another that a cache
has forgotten the first by then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from compression.logs.log_reader import LogInvalid, LogReader
from compression.logs.synth import SynthSettings, synthesize
from features.anchor import from_anchors
from features.encoding import Vocabulary, encode_histories
from features.sequence import SequenceBatch, pack
from infra.bench.serve import payload
from infra.bench.serve.shape import CANDIDATES, COLUMNS, HISTORY, ROW

ACTIVE: Final = 2_048
CLICKS: Final = 8  # of a session
TIMES: Final = 3
# A log of so many users with about a hundred events each, as the real one has, drawn where none is given;
# with more where all histories are to be full.
_USERS: Final = 1_000
_EVENTS: Final = 100
_EVENTS_OF_LONG: Final = 250
_CATEGORIES: Final = 100
_COLUMNS: Final = ("users", "lengths", "events", "candidates", "rows")

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Events:
    """Columns of a log, in its order; behaviours are codes."""

    name: str
    users: Int64
    items: Int64
    categories: Int64
    behaviors: Int64
    timestamps: Int64

    @classmethod
    def read(cls, path: Path) -> Events:
        chunks = list(LogReader(path).chunks())
        names = ("users", "items", "categories", "behaviors", "timestamps")
        columns = [np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in names]
        return cls(path.name, *columns)

    @classmethod
    def drawn(cls, vocabulary: Vocabulary, seed: int, *, full: bool = False) -> Events:
        """Users as `tailrace synth` draws them, of items that the vocabulary knows; most with more events
        than a history holds where these are to be `full`."""
        known = len(vocabulary.item_ids)
        made = synthesize(
            SynthSettings(
                events=_USERS * (_EVENTS_OF_LONG if full else _EVENTS),
                users=_USERS,
                items=max(2, known),
                categories=min(_CATEGORIES, max(2, known)),
                seed=seed,
            )
        )
        place = np.unique(made.items, return_inverse=True)[1] % known
        category = np.minimum(vocabulary.item_categories[place], len(vocabulary.category_ids)) - 1
        return cls(
            f"synthetic, seed {seed}",
            made.users,
            vocabulary.item_ids[place],
            vocabulary.category_ids[category],
            made.behaviors,
            made.timestamps,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Sessions:
    """Lists in the order in which they are asked for.

    users [n] are numbers of sessions, lengths [n] events in a history; events [n, HISTORY, 4] the columns
    item, category, behaviour and timestamp, oldest first; candidates [n, CANDIDATES] item ids, each once;
    rows [n, ROW] what a network is shown of them, as rows of the model's tables. By `again` the numbers are
    higher where the lists are asked for over again by others.
    """

    users: Int64
    lengths: Int64
    events: Int64
    candidates: Int64
    rows: Int32
    again: int

    def __len__(self) -> int:
        return len(self.users)

    @property
    def shown(self) -> Int32:
        """How many events of each history a network is shown, [n]."""
        return payload.tensors(self.rows)["lengths"]

    def of(self, part: int, parts: int) -> Sessions:
        """The lists of some of the users."""
        some = self.users % parts == part
        return replace(self, **{name: getattr(self, name)[some] for name in _COLUMNS})

    def requests(self, lists: int) -> list[Int32]:
        """As servers get them: [lists, ROW] each."""
        return [self.rows[start : start + lists] for start in range(0, len(self) - lists + 1, lists)]

    def sequences(self) -> Iterator[bytes]:
        """Histories as the stream has them."""
        for events, length in zip(self.events, self.lengths.tolist(), strict=True):
            yield pack(*events[:length].T)

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **{name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def load(cls, path: Path) -> Sessions:
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{name: arrays[name] for name in _COLUMNS}, again=int(arrays["again"]))

    @classmethod
    def drawn(
        cls,
        log: Events,
        vocabulary: Vocabulary,
        *,
        seed: int,
        hop: int = 0,
        active: int = ACTIVE,
        clicks: int = CLICKS,
        times: int = TIMES,
        full: bool = False,
    ) -> Sessions:
        """`times` times `clicks` turns of `active` users, of `clicks` clicks each where the log goes on for
        so long; when the first turn begins sessions have come more or less far. Histories are shown from
        their anchors on (`features.anchor`). `full`: all of them are, as of those who have come for long;
        raises `LogInvalid` where nobody has."""
        rng = np.random.default_rng(seed)
        by_user = np.argsort(log.users, kind="stable")
        users = log.users[by_user]
        starts = np.searchsorted(users, users)  # where the user of each event begins
        left = np.searchsorted(users, users, side="right") - np.arange(len(users))
        before = np.arange(len(users)) - starts
        wanted = (left >= min(clicks, int(left.max()))) & (before >= (HISTORY - 1 if full else 0))
        able = np.flatnonzero(wanted)
        if not len(able):
            raise LogInvalid(f"nobody has {HISTORY} events and then {clicks} clicks in {log.name}")
        first = np.stack([rng.choice(able, active, replace=len(able) < active) for _ in range(times)])
        first = np.concatenate([first, first[:1]])
        session, click = [], []
        for turn in range(times * clicks):
            time, since = np.divmod(turn + np.arange(active) % clicks, clicks)
            began = first[time, np.arange(active)]
            going = rng.permutation(np.flatnonzero(left[began] > since))
            session.append(going + time[going] * active)
            click.append((began + since)[going])
        last = np.concatenate(click)
        lengths = np.minimum(before[last] + 1, HISTORY)
        back = np.arange(HISTORY) - lengths[:, None] + 1
        at = by_user[np.where(back <= 0, last[:, None] + back, last[:, None])]
        columns = (log.items, log.categories, log.behaviors, log.timestamps)
        events = np.where((back <= 0)[..., None], np.stack([column[at] for column in columns], axis=2), 0)
        candidates = _candidates(log.items, len(last), rng)
        rows = _rows(events, lengths, candidates, vocabulary, hop)
        return cls(np.concatenate(session), lengths, events, candidates, rows, times * active)


def _candidates(items: Int64, lists: int, rng: np.random.Generator) -> Int64:
    """Different items for each list, drawn as often as they were clicked; ids that nobody clicked where the
    log has not so many."""
    more = items.max() + 1 + np.arange(CANDIDATES)
    drawn = items[rng.integers(0, len(items), (lists, 2 * CANDIDATES))]
    chosen = np.empty((lists, CANDIDATES), np.int64)
    for row, some in zip(chosen, drawn.tolist(), strict=True):
        row[:] = list(dict.fromkeys([*some, *more.tolist()]))[:CANDIDATES]
    return chosen


def _rows(events: Int64, lengths: Int64, candidates: Int64, vocabulary: Vocabulary, hop: int) -> Int32:
    """[n, ROW], as `features.encoding` has it for the network."""
    flat = events[np.arange(HISTORY) < lengths[:, None]].T
    shown = from_anchors(SequenceBatch(lengths, *flat), HISTORY, hop)
    arrays = encode_histories(shown, vocabulary, HISTORY).tensors()
    columns: list[npt.NDArray[Any]] = [arrays[name] for name in COLUMNS]
    columns += [
        shown.lengths[:, None],
        vocabulary.item_rows_of(candidates),
        vocabulary.category_rows_of_items(candidates),
    ]
    rows = np.concatenate(columns, axis=1).astype(np.int32)
    assert rows.shape[1] == ROW
    return rows
