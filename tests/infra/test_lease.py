"""One retraining at a time: two processes, a process that is paused, a Redis that goes away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from compression.releases.fence import Fence, Superseded
from compression.releases.registry import Registry
from features import keys
from infra.retraining.lease import Lease, LeaseHeld, LeaseUnavailable
from tests.compression.versions import registry_of
from tests.support import eventually

ROOT = Path(__file__).resolve().parents[2]
# Takes the lease, says its token, and promotes a version once it is told to.
HOLDER = """
import sys
from pathlib import Path
from compression.releases.fence import Superseded
from compression.releases.registry import Registry
from infra.retraining.lease import Lease, LeaseHeld

url, root, version, ttl_s = sys.argv[1:]
try:
    with Lease(url, Path(root), "serving", ttl_s=float(ttl_s)) as lease:
        print("token", lease.token, flush=True)
        sys.stdin.readline()
        with lease.changing():
            Registry(root).promote(version)
        print("promoted", flush=True)
except LeaseHeld:
    print("held", flush=True)
except Superseded:
    print("superseded", flush=True)
"""


class Holder:
    """A process that wants the lease."""

    def __init__(self, url: str, root: Path, version: str, ttl_s: float) -> None:
        command = [sys.executable, "-c", HOLDER, url, str(root), version, str(ttl_s)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def says(self) -> str:
        assert self._child.stdout is not None
        return self._child.stdout.readline().strip()

    def go_on(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def end(self) -> None:
        self._child.kill()
        self._child.communicate()


@pytest.fixture
def start(redis_url, tmp_path):
    registry_of(tmp_path, "v1", "v2", "v3").promote("v3")
    holders = []

    def start(version: str, ttl_s: float = 30.0) -> Holder:
        holders.append(Holder(redis_url, tmp_path / "models", version, ttl_s))
        return holders[-1]

    yield start
    for holder in holders:
        holder.end()


def test_of_two_processes_one_retrains_and_the_next_has_a_higher_token(start, tmp_path):
    first, second = start("v1"), start("v2")
    said = {first.says(): first, second.says(): second}
    (token,) = (words for words in said if words.startswith("token"))
    assert set(said) == {token, "held"}
    said[token].go_on()
    assert said[token].says() == "promoted"
    third = start("v2")
    assert int(third.says().split()[1]) > int(token.split()[1])
    third.go_on()
    assert third.says() == "promoted"
    assert Registry(tmp_path / "models").resolve("serving") == "v2"


def test_a_holder_that_was_paused_past_its_lease_promotes_nothing(start, tmp_path, redis_url):
    paused = start("v1", ttl_s=0.3)
    assert paused.says() == "token 1"
    paused.signal(signal.SIGSTOP)
    with redis.Redis.from_url(redis_url) as client:
        eventually(lambda: not client.exists(keys.retraining_lease("serving")))
    later = start("v2")
    assert later.says() == "token 2"
    # The later one is still at work and has promoted nothing when the paused one wakes up and wants to.
    paused.signal(signal.SIGCONT)
    paused.go_on()
    assert paused.says() == "superseded"
    assert Registry(tmp_path / "models").resolve("serving") == "v3"
    later.go_on()
    assert later.says() == "promoted"
    assert Registry(tmp_path / "models").resolve("serving") == "v2"


def test_a_pause_in_which_nobody_came_costs_nothing(start, tmp_path, redis_url):
    paused = start("v1", ttl_s=0.3)
    paused.says()
    paused.signal(signal.SIGSTOP)
    with redis.Redis.from_url(redis_url) as client:
        eventually(lambda: not client.exists(keys.retraining_lease("serving")))
    paused.signal(signal.SIGCONT)
    paused.go_on()
    assert paused.says() == "promoted"


def test_the_registry_refuses_an_old_token_whatever_redis_says(redis_url, tmp_path):
    with Lease(redis_url, tmp_path, "serving") as old:
        with Fence(tmp_path, "serving").passed(old.token + 1):
            pass
        old.check()  # Redis knows of no other
        with pytest.raises(Superseded), old.changing():
            pytest.fail("promoted with an old token")


def test_a_redis_that_has_lost_its_data_gives_no_token_twice(redis_url, tmp_path):
    with Lease(redis_url, tmp_path, "serving") as first:
        pass
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    with Lease(redis_url, tmp_path, "serving") as second:
        assert second.token > first.token


def test_a_lease_is_renewed_while_it_is_held_and_given_back_after(redis_url, tmp_path):
    with redis.Redis.from_url(redis_url) as client, Lease(redis_url, tmp_path, "serving", ttl_s=0.5) as lease:
        name = keys.retraining_lease("serving")
        renewed = eventually(lambda: (left := client.pttl(name)) < 400 and left)
        eventually(lambda: client.pttl(name) > renewed)
        with pytest.raises(LeaseHeld), Lease(redis_url, tmp_path, "serving"):
            pytest.fail("two hold the lease")
        lease.check()
    with redis.Redis.from_url(redis_url) as client:
        assert not client.exists(name)


def test_a_lease_that_a_killed_process_left_is_waited_for(start, redis_url, tmp_path):
    killed = start("v1", ttl_s=1.5)
    assert killed.says() == "token 1"
    killed.end()
    with pytest.raises(LeaseHeld), Lease(redis_url, tmp_path / "models", "serving"):
        pytest.fail("two hold the lease")
    with Lease(redis_url, tmp_path / "models", "serving", patience_s=10) as lease:
        assert lease.token == 2


def test_while_redis_is_away_the_lease_lasts_as_long_as_it_would_have(redis_server, redis_url, tmp_path):
    with Lease(redis_url, tmp_path, "serving", ttl_s=1.0) as lease:
        redis_server.stop()
        lease.check()

        def lost() -> bool:
            try:
                lease.check()
            except Superseded:
                return True
            return False

        eventually(lost)
        with pytest.raises(Superseded), lease.changing():
            pytest.fail("promoted without a lease")
    with pytest.raises(LeaseUnavailable), Lease(redis_url, tmp_path, "serving"):
        pytest.fail("a lease from nowhere")
