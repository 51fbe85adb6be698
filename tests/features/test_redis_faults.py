"""What the Redis store does when Redis does not: hangs, dies, refuses, loses its place in a cluster."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis

from features import keys
from features.breaker import Breaker
from features.redis_store import CLUSTER_SCHEME, RedisStore
from features.sequence import unpack
from features.settings import FeatureSettings
from features.store import Append, StoreUnavailable
from infra.local.redis import LocalRedis
from infra.local.server import free_port
from tests.support import eventually, eventually_async

PATIENT = FeatureSettings(store_timeout_ms=5_000)
QUICK = FeatureSettings(store_timeout_ms=80, breaker_failures=2, breaker_open_ms=200)


def event(offset: int, user: int = 1) -> Append:
    return Append(user, 1000 + offset, 7, 0, 1_511_539_200 + offset, 5, 0, offset)


def items(value: bytes | None) -> list[int]:
    return unpack([value]).items.tolist()


async def test_a_hung_server_costs_the_timeout_once_per_failure_and_then_nothing(
    redis_server: Any, redis_url: str
) -> None:
    store = RedisStore(redis_url, settings=QUICK)
    batch = [event(offset) for offset in range(20)]
    await store.append(batch)
    redis_server.pause()
    try:
        took_s = []
        for _ in range(2):
            started_s = time.monotonic()
            with pytest.raises(StoreUnavailable, match="did not answer within"):
                await store.append([event(20), event(21)])
            took_s.append(time.monotonic() - started_s)
        assert 0.07 < min(took_s) < 0.4
        with pytest.raises(StoreUnavailable, match="breaker is open"):
            await store.read([1])
    finally:
        redis_server.resume()

    await eventually_async(lambda: answers(store))
    # The batch that timed out was in the server's buffer: it counts once, whoever was first.
    repeated, _ = await store.append([event(20), event(21), event(22)])
    assert repeated[2].applied
    assert items(repeated[2].sequence) == list(range(1000, 1023))
    await store.close()


async def test_an_answer_that_came_while_the_loop_was_held_up_is_read_not_given_up(
    redis_server: Any, redis_url: str
) -> None:
    await reads_what_came_while_the_loop_was_held_up(redis_url, [redis_server])


async def reads_what_came_while_the_loop_was_held_up(url: str, servers: Sequence[Any]) -> None:
    users = range(1_000, 1_300)
    patient = RedisStore(url, settings=PATIENT)
    await patient.append([event(at, user) for user in users for at in range(60)])
    await patient.close()
    settings = FeatureSettings(store_timeout_ms=400)
    store = RedisStore(url, settings=settings)
    await eventually_async(lambda: answers(store))
    for server in servers:
        server.pause()
    reading = asyncio.create_task(store.read(users))
    for _ in range(50):
        await asyncio.sleep(0)
    # By now it is sent. What holds the loop is ours; Redis answers meanwhile.
    for server in servers:
        server.resume()
    time.sleep(2 * settings.store_timeout_ms / 1000)  # noqa: ASYNC251
    assert [len(items(user.sequence)) for user in await reading] == [60] * 300
    await store.close()


async def answers(store: RedisStore) -> bool:
    try:
        # Of many users: every node of a cluster is connected then.
        await store.read(range(1_000, 1_300))
    except StoreUnavailable:
        return False
    return True


async def test_a_hung_server_does_not_hold_the_loop(redis_server: Any, redis_url: str) -> None:
    store = RedisStore(redis_url, settings=FeatureSettings(store_timeout_ms=1_000))
    await store.ping()
    redis_server.pause()
    try:
        call = asyncio.create_task(store.read([1]))
        turns = 0
        while not call.done():
            await asyncio.sleep(0.001)
            turns += 1
        assert turns > 10
        assert isinstance(call.exception(), StoreUnavailable)
    finally:
        redis_server.resume()
    await store.close()


async def test_a_server_that_is_gone_and_comes_back_is_used_again(redis_server: Any, redis_url: str) -> None:
    store = RedisStore(redis_url, settings=PATIENT, breaker=Breaker(1, 0.05))
    await store.append([event(0)])
    redis_server.kill()
    with pytest.raises(StoreUnavailable):
        await store.append([event(1)])
    redis_server.start()

    async def applied() -> bool:
        try:
            answers, _ = await store.append([event(0), event(1)])
        except StoreUnavailable:
            return False
        return answers[1].applied

    await eventually_async(applied)
    await store.close()


async def test_nobody_listening_is_unavailable() -> None:
    store = RedisStore(f"redis://127.0.0.1:{free_port()}/0", settings=PATIENT)
    for call in (
        store.ping(),
        store.read([1]),
        store.append([event(0)]),
        store.increment({"c:{1}": {1: 1.0}}),
    ):
        with pytest.raises(StoreUnavailable):
            await call
    await store.close()


async def test_a_key_of_another_type_is_written_over_and_holds_nothing_up(redis_url: str) -> None:
    store = RedisStore(redis_url, settings=PATIENT)
    with redis.Redis.from_url(redis_url) as client:
        client.lpush(keys.sequence(2), "not a sequence")
    batch = [event(0, 1), event(1, 2), event(2, 3), event(3, 2), event(4, 1)]
    answers, _ = await store.append(batch)
    assert all(answer.applied for answer in answers)
    users = await store.read([1, 2, 3])
    assert [items(user.sequence) for user in users] == [[1000, 1004], [1001, 1003], [1002]]
    await store.close()


async def test_a_server_out_of_memory_fails_all_events_of_a_user_or_none(redis_url: str) -> None:
    store = RedisStore(redis_url, settings=PATIENT)
    with redis.Redis.from_url(redis_url) as client:
        await store.append([event(0)])
        client.config_set("maxmemory", "1mb")
        try:
            with pytest.raises(StoreUnavailable, match="memory"):
                await store.append([event(1), event(2)])
        finally:
            client.config_set("maxmemory", "0")
    answers, _ = await store.append([event(1), event(2)])
    assert [answer.applied for answer in answers] == [True, True]
    assert items(answers[1].sequence) == [1000, 1001, 1002]
    await store.close()


async def test_a_cancelled_call_leaves_no_reply_behind_for_the_next(
    redis_server: Any, redis_url: str
) -> None:
    store = RedisStore(redis_url, settings=PATIENT)
    await store.append([event(0), event(1, 2)])
    redis_server.pause()
    try:
        call = asyncio.create_task(store.read([1]))
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    finally:
        redis_server.resume()
    assert items((await store.read([2]))[0].sequence) == [1001]
    await store.close()


class ClusterNode(LocalRedis):
    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir)
        self._bus_port = free_port(self.port)

    def _command(self) -> list[str]:
        return [*super()._command(), "--cluster-enabled", "yes", "--cluster-port", str(self._bus_port)]

    def join(self, first: ClusterNode) -> None:
        with redis.Redis.from_url(self.url) as client:
            client.execute_command("CLUSTER MEET", "127.0.0.1", first.port, first._bus_port)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ClusterNode]]:
    """Three nodes, a third of the slots each."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    bounds = [0, 5461, 10923, 16384]
    with ExitStack() as running:
        nodes = [
            running.enter_context(ClusterNode(tmp_path_factory.mktemp(f"node{number}")))
            for number in range(3)
        ]
        for number, node in enumerate(nodes):
            with redis.Redis.from_url(node.url) as client:
                client.execute_command("CLUSTER ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
            if number:
                node.join(nodes[0])

        def agreed() -> bool:
            for node in nodes:
                with redis.Redis.from_url(node.url) as client:
                    state = client.execute_command("CLUSTER INFO")
                    if state["cluster_state"] != "ok" or state["cluster_known_nodes"] != "3":
                        return False
            return True

        eventually(agreed, 30.0)
        yield nodes


async def test_a_cluster_answers_like_one_server(cluster: list[ClusterNode]) -> None:
    store = RedisStore(CLUSTER_SCHEME + cluster[0].address, settings=PATIENT)
    await store.ping()
    await store.increment({keys.category(3): {5: 2.0, 2**62: 1.0}, keys.POPULAR: {9: 1.0}})
    batch = [event(offset, user=offset % 30) for offset in range(200)]
    answers, (near, far) = await store.append(batch, neighbours=[keys.category(3), keys.POPULAR])
    assert all(answer.applied for answer in answers)
    assert (near.items.tolist(), far.items.tolist()) == ([5, 2**62], [9])
    again, _ = await store.append(batch)
    assert not any(answer.applied for answer in again)
    values = [user.sequence for user in await store.read(range(31))]
    for user in range(30):
        assert items(values[user]) == [1000 + offset for offset in range(user, 200, 30)]
    assert values[30] is None
    await store.set_tier(30, "premium")
    assert await store.read([30]) == [(None, "premium")]
    assert (await store.append([event(900, user=30)]))[0][0].tier == "premium"
    await store.set_tier(30, None)
    held = []
    for node in cluster:
        with redis.Redis.from_url(node.url) as client:
            held.append(client.dbsize())
    assert sum(held) == 33
    assert min(held) > 0
    await store.close()


async def test_a_cluster_s_answer_that_came_while_the_loop_was_held_up_is_read(
    cluster: list[ClusterNode],
) -> None:
    await reads_what_came_while_the_loop_was_held_up(CLUSTER_SCHEME + cluster[0].address, cluster)


async def test_a_node_that_hangs_costs_its_timeout_and_the_cluster_answers_after(
    cluster: list[ClusterNode],
) -> None:
    store = RedisStore(CLUSTER_SCHEME + cluster[0].address, settings=FeatureSettings(store_timeout_ms=400))
    await eventually_async(lambda: answers(store))
    users = range(2_000, 2_030)
    await store.append([event(2000, user) for user in users])
    cluster[1].pause()
    try:
        started_s = time.monotonic()
        with pytest.raises(StoreUnavailable, match="did not answer within"):
            await store.read(users)
        assert 0.35 < time.monotonic() - started_s < 2.0
    finally:
        cluster[1].resume()

    await eventually_async(lambda: answers(store))
    assert [items(user.sequence) for user in await store.read(users)] == [[3000]] * len(users)
    await store.close()
