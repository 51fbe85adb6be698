"""The broker and the Redis that tests and benchmarks stop, break and start again."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from infra.local.kafka import LocalKafka
from infra.local.redis import LocalRedis
from infra.local.server import HOST, ServerFailed, free_port, is_free
from tests.support import eventually
from topics.admin import TopicsUnavailable, ping, topic_epoch
from topics.catalog import Topic


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_broker_started_again_has_its_address_its_topics_and_its_records(
    kafka: Any, make_topics: Callable[..., dict[str, Topic]], end: str
) -> None:
    topic = make_topics(partitions=1)["clicks"].name
    before, epoch = kafka.bootstrap, topic_epoch(kafka.bootstrap, topic)
    producer = KafkaProducer(bootstrap_servers=before)
    producer.send(topic, b"kept", partition=0).get(timeout=10)
    producer.close()
    getattr(kafka, end)()
    assert not listens(before)
    kafka.start()
    assert kafka.bootstrap == before
    assert topic_epoch(before, topic) == epoch
    consumer = KafkaConsumer(bootstrap_servers=before, auto_offset_reset="earliest")
    consumer.assign([TopicPartition(topic, 0)])
    records = eventually(lambda: consumer.poll(timeout_ms=500), 30, what="the record is read")
    consumer.close()
    assert [record.value for batch in records.values() for record in batch] == [b"kept"]


def test_a_paused_broker_listens_and_does_not_answer(kafka: Any, bootstrap: str) -> None:
    kafka.pause()
    try:
        assert listens(bootstrap)
        with pytest.raises(TopicsUnavailable, match="does not answer"):
            ping(bootstrap, timeout_s=0.5)
    finally:
        kafka.resume()
    eventually(lambda: ping(bootstrap) == 1, 20, what="the broker answers again")


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_redis_started_again_has_its_address_and_its_keys(
    redis_server: Any, redis_url: str, end: str
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.set("kept", "yes")
    getattr(redis_server, end)()
    assert not listens(redis_server.address)
    redis_server.start()
    assert redis_server.url == redis_url
    with redis.Redis.from_url(redis_url) as client:
        assert client.get("kept") == b"yes"


def test_a_later_process_finds_and_stops_the_server_of_an_earlier_one(tmp_path: Path) -> None:
    with LocalRedis(tmp_path) as first:
        found = LocalRedis(tmp_path)
        assert (found.pid, found.port) == (first.pid, first.port)
        assert found.start().pid == first.pid
        found.stop()
        assert first.pid is None
        assert not listens(first.address)


def test_a_run_file_whose_process_is_another_one_now_is_not_believed(tmp_path: Path) -> None:
    with LocalRedis(tmp_path) as server:
        record = (tmp_path / "run.json").read_text()
        (tmp_path / "run.json").write_text(record.replace('"created_s": ', '"created_s": 1'))
        assert LocalRedis(tmp_path).pid is None
        (tmp_path / "run.json").write_text(record)
        assert LocalRedis(tmp_path).pid == server.pid


def test_a_server_never_passes_off_a_stranger_on_its_port_as_its_own(tmp_path: Path) -> None:
    with LocalRedis(tmp_path / "first") as first:
        second = LocalRedis(tmp_path / "second", port=first.port)
        with pytest.raises(ServerFailed, match=f"port {first.port} for redis is taken"):
            second.start()
        second.stop()
        assert first.pid is not None


def test_a_server_that_cannot_start_says_why_from_its_log(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").touch()
    with pytest.raises(ServerFailed, match=r"redis ended with 1\n(.*\n)*.*append"):
        LocalRedis(tmp_path).start()


class _Interrupted(LocalRedis):
    """Somebody presses Ctrl-C while it starts: before it is waited for, or then."""

    waits = False

    def _answers(self) -> bool:
        assert self.waits
        raise KeyboardInterrupt


@pytest.mark.parametrize("waits", [False, True])
def test_a_server_whose_start_is_interrupted_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    server = _Interrupted(tmp_path / "redis")
    server.waits = waits
    popen, started = subprocess.Popen, []

    def interrupted(*told: Any, **also: Any) -> Any:
        started.append(popen(*told, **also))
        if not waits:
            signal.raise_signal(signal.SIGINT)  # before anybody knows of the process
        return started[0]

    monkeypatch.setattr("infra.local.server.subprocess.Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.start()
    started[0].wait(10)  # is over
    assert server.pid is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_missing_program_is_named_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(ServerFailed, match="apt-get install redis-server"):
        LocalRedis(tmp_path / "redis").start()
    with pytest.raises(ServerFailed, match="apt-get install openjdk-17-jre-headless"):
        LocalKafka(tmp_path / "kafka").start()


def test_a_port_is_free_until_someone_listens() -> None:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port = listener.getsockname()[1]
        listener.listen()
        assert not is_free(port)
    assert is_free(port)


def test_free_ports_are_none_that_the_system_gives_to_clients() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(port < first for port in (free_port() for _ in range(50)))


def test_the_brokers_two_ports_are_never_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = LocalKafka(tmp_path, port=free_port())
    drawn = iter([broker.port])
    draw = random.randrange
    monkeypatch.setattr(random, "randrange", lambda *between: next(drawn, None) or draw(*between))
    with broker:
        assert broker.pid is not None
    assert next(drawn, None) is None


def test_a_broker_that_cannot_start_says_why_and_not_where(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "meta.properties").write_text("version=1\nnode.id=2\ncluster.id=elsewhere\n")
    with pytest.raises(ServerFailed, match="Stored node id 2 doesn't match"):
        LocalKafka(tmp_path).start()
