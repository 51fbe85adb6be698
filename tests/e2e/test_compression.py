"""A release of another network, compressed or for retrieval, reaches a running worker as any other does, and
no click goes without its list."""

from __future__ import annotations

import json
import shutil
import time

import pytest
from click.testing import CliRunner
from kafka import KafkaConsumer, KafkaProducer

from compression.releases.registry import Registry
from infra.commands.retraining import retrain
from tests.models import small_log
from tests.support import eventually
from topics.codec import decode_recommendation, encode, record_key
from topics.messages import BehaviorEvent


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        (["--recipe", "tiny", "--compress", "all"], ("ranking", 24, 32)),
        (["--network", "retrieval"], ("retrieval", 64, 256)),
    ],
)
def test_a_worker_takes_the_version_and_ranks_with_it(
    parts, start_worker, registry, tmp_path, monkeypatch, options, sizes
):
    models = tmp_path / "models"
    shutil.copytree(registry, models)
    worker = start_worker(options=["--registry", str(models)])
    producer = KafkaProducer(bootstrap_servers=parts.kafka.bootstrap, linger_ms=0)
    consumer = KafkaConsumer(
        parts.topics.recommendations,
        bootstrap_servers=parts.kafka.bootstrap,
        group_id=None,
        auto_offset_reset="earliest",
    )
    lists = {}

    def click(user):
        """The list that answers a new click of the user."""
        event = BehaviorEvent(
            event_id=f"{user}-{time.monotonic_ns()}",
            user_id=user,
            item_id=1 + user,
            category_id=1,
            behavior="pv",
            timestamp=int(time.time()),
        )
        value, headers = encode(event)
        producer.send(parts.topics.clicks, key=record_key(user), value=value, headers=headers)

        def answered():
            for records in consumer.poll(timeout_ms=50).values():
                for record in records:
                    body = decode_recommendation(record.value, record.headers)
                    lists.update((asked.event_id, body) for asked in body.trigger.clicks)
            return lists.get(event.event_id)

        return eventually(answered, 30, what="a list")

    first = click(1).model_version
    monkeypatch.setenv("GATE_TEACHER_LOSS", "1")
    monkeypatch.setenv("GATE_MARGIN", "1")
    told = ["--log", small_log(tmp_path / "clicks.csv"), *options, "--epochs", 1, "--json"]
    told += ["--registry", models, "--runs", tmp_path / "runs"]
    told += ["--bootstrap", parts.kafka.bootstrap, "--topic-suffix", parts.topic_suffix]
    answer = CliRunner().invoke(retrain, [str(word) for word in told])
    assert answer.exit_code == 0, answer.output
    released = json.loads(answer.stdout)["version"]
    manifest = Registry(models).open().manifest
    assert manifest.version == released
    assert (manifest.kind, manifest.model.dim, manifest.model.ffn) == sizes
    eventually(lambda: worker.readiness()["model"] == released, 30)
    later = [click(user) for user in range(2, 12)]
    assert {one.model_version for one in later} == {released} != {first}
    assert all(one.degraded is None and len(one.items) == 10 for one in later)
    producer.close()
    consumer.close()
