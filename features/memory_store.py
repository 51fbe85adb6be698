"""The feature store in memory: the twin of `redis_store`, for tests and laptops.

It keeps the same bytes under the same rules; one suite runs on both.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from features import keys
from features.sequence import (
    FENCE_BYTES,
    HEADER_BYTES,
    MAX_FENCES,
    NARROW,
    WIDE,
    WIDTH,
    pack_event,
    pack_fence,
)
from features.settings import FeatureSettings
from features.store import Append, Appended, Neighbours, User, log2_add

_TIMESTAMP_AT = {NARROW: 4, WIDE: 16}


class MemoryStore:
    """What `RedisStore` is, without a server. Lifetimes are measured by `clock`."""

    def __init__(
        self,
        *,
        settings: FeatureSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings or FeatureSettings()
        self._clock = clock
        self._sequences: dict[int, tuple[bytes, float]] = {}
        self._tiers: dict[int, str] = {}
        self._statistics: dict[str, tuple[dict[int, float], float]] = {}

    async def append(
        self, appends: Sequence[Append], *, neighbours: Sequence[str] = (), limit: int = 50
    ) -> tuple[list[Appended], list[Neighbours]]:
        answers = [self._append(event) for event in appends]
        return answers, await self.neighbours(neighbours, limit)

    async def read(self, user_ids: Sequence[int]) -> list[User]:
        return [User(self._sequence(user), self._tiers.get(user)) for user in user_ids]

    async def tiers(self, user_ids: Sequence[int]) -> list[str | None]:
        return [self._tiers.get(user) for user in user_ids]

    async def set_tier(self, user_id: int, tier: str | None) -> None:
        if tier is None:
            self._tiers.pop(user_id, None)
        else:
            self._tiers[user_id] = tier

    async def neighbours(self, names: Sequence[str], limit: int) -> list[Neighbours]:
        return [self._neighbours(name, limit) for name in names]

    async def increment(self, increments: Mapping[str, Mapping[int, float]]) -> None:
        for name, added in increments.items():
            bound = keys.bound(name)
            kept = self._statistic(name)
            for item, log2 in added.items():
                kept[item] = log2_add(kept[item], log2) if item in kept else log2
            heaviest = sorted(kept.items(), key=_heaviest_first)[: bound.members]
            self._statistics[name] = (dict(heaviest), self._clock() + bound.ttl_s)

    async def ping(self) -> None:
        return None

    async def close(self) -> None:
        return None

    def _append(self, event: Append) -> Appended:
        settings = self._settings
        fence = pack_fence(event.epoch, event.partition, event.offset)
        record = pack_event(event.item_id, event.category_id, event.behavior, event.timestamp)
        value = self._sequence(event.user_id) or bytes((NARROW, 0))
        tier = self._tiers.get(event.user_id)
        body_at = HEADER_BYTES + FENCE_BYTES * value[1]
        kind, body = value[0], value[body_at:]
        fences = [value[at : at + FENCE_BYTES] for at in range(HEADER_BYTES, body_at, FENCE_BYTES)]
        at = next((at for at, kept in enumerate(fences) if kept[4:8] == fence[4:8]), None)
        if at is None:
            fences = [*fences[-(MAX_FENCES - 1) :], fence]
        elif fences[at][:4] == fence[:4] and event.offset <= struct.unpack("<d", fences[at][8:])[0]:
            return Appended(False, value, tier)
        else:
            fences[at] = fence
        if kind == NARROW and len(record) == WIDTH[WIDE]:
            kind, body = WIDE, b"".join(map(_widen, _records(body, NARROW)))
        elif kind == WIDE and len(record) == WIDTH[NARROW]:
            record = _widen(record)
        kept = [*_records(body, kind), record][-settings.sequence_events :]
        oldest = event.timestamp - settings.sequence_max_age_s
        while struct.unpack_from("<I", kept[0], _TIMESTAMP_AT[kind])[0] < oldest:
            del kept[0]
        value = bytes((kind, len(fences))) + b"".join(fences) + b"".join(kept)
        self._sequences[event.user_id] = (value, self._clock() + settings.sequence_ttl_s)
        return Appended(True, value, tier)

    def _sequence(self, user_id: int) -> bytes | None:
        value, expires_s = self._sequences.get(user_id, (None, 0.0))
        return value if self._clock() < expires_s else None

    def _statistic(self, name: str) -> dict[int, float]:
        kept, expires_s = self._statistics.get(name, ({}, 0.0))
        return dict(kept) if self._clock() < expires_s else {}

    def _neighbours(self, name: str, limit: int) -> Neighbours:
        heaviest = sorted(self._statistic(name).items(), key=_heaviest_first)[:limit]
        return Neighbours(
            np.array([item for item, _ in heaviest], np.int64),
            np.array([log2 for _, log2 in heaviest], np.float64),
        )


def _heaviest_first(member: tuple[int, float]) -> tuple[float, bytes]:
    # Redis orders equal scores by member bytes, and the reversed range turns both around.
    item, log2 = member
    return -log2, bytes(255 - byte for byte in item.to_bytes(8, "little"))


def _records(body: bytes, kind: int) -> list[bytes]:
    width = WIDTH[kind]
    return [body[at : at + width] for at in range(0, len(body), width)]


def _widen(record: bytes) -> bytes:
    item, timestamp, packed = struct.unpack("<III", record)
    return struct.pack("<QQII", item, packed & (1 << 30) - 1, timestamp, packed >> 30)
