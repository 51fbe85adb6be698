"""The feature store on Redis: the only file that knows Redis."""

from __future__ import annotations

import asyncio
import hashlib
import math
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from redis.asyncio import ConnectionPool, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

from features import keys
from features.breaker import Breaker
from features.sequence import pack_event, pack_fence
from features.settings import FeatureSettings
from features.store import Append, Appended, Neighbours, StoreUnavailable, User

CLUSTER_SCHEME: Final = "redis+cluster://"
# Lua's unpack() is bounded by its stack; this is far below.
_MEMBERS_PER_SCRIPT: Final = 512
# Of the loop, for what came before the timer was run. An answer of many kilobytes takes several, one of
# several nodes some more.
_LAST_TURNS: Final = 10
_MEMBER: Final = struct.Struct("<q")
_NOTHING: Final = Neighbours(np.empty(0, np.int64), np.empty(0, np.float64))

Command = tuple[Any, ...]


class _Script:
    def __init__(self, name: str) -> None:
        self.text = Path(__file__).with_name(name).read_bytes()
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest()


_APPEND: Final = _Script("append.lua")
_INCREMENT: Final = _Script("increment.lua")


class RedisStore:
    """Sequences and statistics in Redis or, with `redis+cluster://HOST:PORT`, in a Redis Cluster.

    A call is one round trip (one per node in a cluster) and waits `store_timeout_ms` at most. Any
    error is `StoreUnavailable`; after a streak of them calls fail at once until a probe succeeds.
    """

    def __init__(
        self,
        url: str,
        *,
        settings: FeatureSettings | None = None,
        breaker: Breaker | None = None,
    ) -> None:
        settings = settings or FeatureSettings()
        self._timeout_s = settings.store_timeout_ms / 1000
        self.breaker = breaker or Breaker(settings.breaker_failures, settings.breaker_open_ms / 1000)
        self._client: _Client = _Cluster(url) if url.startswith(CLUSTER_SCHEME) else _Server(url)
        self._max_age_s = settings.sequence_max_age_s
        self._sequence_options = (
            b"%d" % settings.sequence_events,
            b"%d" % (settings.sequence_ttl_s * 1000),
        )

    async def append(
        self, appends: Sequence[Append], *, neighbours: Sequence[str] = (), limit: int = 50
    ) -> tuple[list[Appended], list[Neighbours]]:
        commands: list[Command] = []
        # One command per user, its events in order: see append.lua for why.
        places: dict[int, list[int]] = {}
        arguments: dict[int, list[Any]] = {}
        max_age_s = self._max_age_s
        for place, (user, item, category, behavior, timestamp, epoch, partition, offset) in enumerate(
            appends
        ):
            argument = arguments.get(user)
            if argument is None:
                argument = arguments[user] = [
                    b"EVALSHA",
                    _APPEND.sha,
                    b"2",
                    keys.sequence(user),
                    keys.tier(user),
                    *self._sequence_options,
                ]
                places[user] = []
            argument += (
                pack_fence(epoch, partition, offset),
                pack_event(item, category, behavior, timestamp),
                b"%d" % (timestamp - max_age_s),
            )
            places[user].append(place)
        commands.extend(map(tuple, arguments.values()))
        commands.extend(_read_neighbours(name, limit) for name in neighbours)
        replies = await self._call(commands)
        answers: list[Appended] = [_NOT_APPLIED] * len(appends)
        for own, reply in zip(places.values(), replies, strict=False):
            at, tier = 0, _text(reply[-1])
            for place in own:
                answers[place] = Appended(reply[at] == 1, reply[at + 1], tier)
                at += 2
        return answers, [_neighbours(reply) for reply in replies[len(places) :]]

    async def read(self, user_ids: Sequence[int]) -> list[User]:
        replies = await self._call([(b"MGET", keys.sequence(user), keys.tier(user)) for user in user_ids])
        return [User(sequence, _text(tier)) for sequence, tier in replies]

    async def tiers(self, user_ids: Sequence[int]) -> list[str | None]:
        # Not GET, which fails where the key is something else than a string.
        replies = await self._call([(b"MGET", keys.tier(user)) for user in user_ids])
        return [_text(tier) for (tier,) in replies]

    async def set_tier(self, user_id: int, tier: str | None) -> None:
        key = keys.tier(user_id)
        await self._call([(b"DEL", key) if tier is None else (b"SET", key, tier)])

    async def neighbours(self, names: Sequence[str], limit: int) -> list[Neighbours]:
        replies = await self._call([_read_neighbours(name, limit) for name in names])
        return [_neighbours(reply) for reply in replies]

    async def increment(self, increments: Mapping[str, Mapping[int, float]]) -> None:
        commands: list[Command] = []
        for name, added in increments.items():
            bound = keys.bound(name)
            head = (
                b"EVALSHA",
                _INCREMENT.sha,
                b"1",
                name,
                b"%d" % bound.members,
                b"%d" % (bound.ttl_s * 1000),
            )
            flat = [part for item, log2 in added.items() for part in (_MEMBER.pack(item), repr(log2))]
            commands.extend(
                (*head, *flat[start : start + 2 * _MEMBERS_PER_SCRIPT])
                for start in range(0, len(flat), 2 * _MEMBERS_PER_SCRIPT)
            )
        await self._call(commands)

    async def ping(self) -> None:
        await self._call([(b"PING",)])

    async def close(self) -> None:
        await self._client.close()

    async def _call(self, commands: Sequence[Command]) -> list[Any]:
        if not commands:
            return []
        if not self.breaker.allow():
            raise StoreUnavailable("Redis did not answer lately; the breaker is open")
        try:
            async with _at_most(self._timeout_s):
                try:
                    replies = await self._client.round_trip(commands)
                except NoScriptError:
                    # A server that lost its scripts. The commands that did run are fenced.
                    await self._client.load((_APPEND.text, _INCREMENT.text))
                    replies = await self._client.round_trip(commands)
        except TimeoutError as error:
            self.breaker.failed()
            raise StoreUnavailable(f"Redis did not answer within {self._timeout_s:.3f} s") from error
        except (RedisError, OSError) as error:
            self.breaker.failed()
            raise StoreUnavailable(f"Redis: {error}") from error
        self.breaker.succeeded()
        return replies


@asynccontextmanager
async def _at_most(timeout_s: float) -> AsyncIterator[None]:
    """`asyncio.timeout`, after a few turns of the loop in which to read what has come.

    A loop that was held up finds the answer and the timer due in the same turn, and would run the timer
    before the task that reads: Redis would be away because we were late.
    """
    async with asyncio.timeout(None) as limit:
        timer = asyncio.get_running_loop().call_later(timeout_s, _expire, limit, _LAST_TURNS)
        try:
            yield
        finally:
            timer.cancel()


def _expire(limit: asyncio.Timeout, turns: int) -> None:
    loop = asyncio.get_running_loop()
    if turns:
        loop.call_soon(_expire, limit, turns - 1)
    else:
        # Refused where the answer was read in those turns and the limit is over.
        with suppress(RuntimeError):
            limit.reschedule(loop.time())


_NOT_APPLIED: Final = Appended(False, b"")


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode(errors="replace")


def _packed(commands: Sequence[Command]) -> bytes:
    """Commands as Redis reads them: arrays of strings with their lengths (RESP)."""
    parts: list[bytes] = []
    add = parts.append
    for command in commands:
        add(b"*%d\r\n" % len(command))
        for argument in command:
            encoded = argument.encode() if isinstance(argument, str) else argument
            add(b"$%d\r\n%b\r\n" % (len(encoded), encoded))
    return b"".join(parts)


def _read_neighbours(name: str, limit: int) -> Command:
    return (b"ZREVRANGE", name, b"0", b"%d" % (limit - 1), b"WITHSCORES")


def _neighbours(reply: list[bytes]) -> Neighbours:
    if not reply:
        return _NOTHING
    return Neighbours(
        np.frombuffer(b"".join(reply[::2]), np.int64),
        np.fromiter(map(float, reply[1::2]), np.float64, len(reply) // 2),
    )


class _Client(Protocol):
    async def round_trip(self, commands: Sequence[Command]) -> list[Any]:
        """The replies; the first error among them is raised, after all were read."""
        ...

    async def load(self, scripts: Sequence[bytes]) -> None: ...

    async def close(self) -> None: ...


class _Server:
    """One Redis server. redis-py's own pipeline arms a timer per reply; one timer around all of
    them (`RedisStore._call`) halves the time a reply costs, and its packing of commands, which knows any
    type and encoding, takes three times that of `_packed`."""

    def __init__(self, url: str) -> None:
        self._pool: Any = ConnectionPool.from_url(
            url,
            socket_timeout=None,
            socket_connect_timeout=None,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            decode_responses=False,
            socket_read_size=256 * 1024,
        )

    async def round_trip(self, commands: Sequence[Command]) -> list[Any]:
        connection = await self._pool.get_connection()
        try:
            await connection.send_packed_command(_packed(commands), check_health=False)
            replies: list[Any] = []
            failure: ResponseError | None = None
            read = connection.read_response
            for _ in commands:
                try:
                    replies.append(await read(disable_decoding=True, timeout=math.inf))
                except ResponseError as error:
                    failure = failure or error
        finally:
            await self._pool.release(connection)
        if failure is not None:
            raise failure
        return replies

    async def load(self, scripts: Sequence[bytes]) -> None:
        await self.round_trip([(b"SCRIPT", b"LOAD", text) for text in scripts])

    async def close(self) -> None:
        await self._pool.disconnect()


class _Cluster:
    """A Redis Cluster. Commands of one key keep their order: they go to the same node. Its calls are
    bounded by `RedisStore._call` alone, as those of one server are."""

    def __init__(self, url: str) -> None:
        self._cluster: Any = RedisCluster.from_url(
            "redis://" + url.removeprefix(CLUSTER_SCHEME),
            socket_timeout=None,
            socket_connect_timeout=None,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            decode_responses=False,
        )

    async def round_trip(self, commands: Sequence[Command]) -> list[Any]:
        if commands == [(b"PING",)]:
            return [await self._cluster.ping()]
        pipeline = self._cluster.pipeline()
        for command, *arguments in commands:
            pipeline.execute_command(command.decode(), *arguments)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def load(self, scripts: Sequence[bytes]) -> None:
        for text in scripts:
            await self._cluster.script_load(text)

    async def close(self) -> None:
        await self._cluster.aclose()
