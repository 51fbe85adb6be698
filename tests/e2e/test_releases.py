"""A canary, its promotion and the way back, driven by commands on a running worker that loses no click."""

from __future__ import annotations

import shutil
import time
from collections import defaultdict

import pytest
from click.testing import CliRunner
from kafka import KafkaConsumer, KafkaProducer

from compression.releases.registry import Registry
from infra.commands.models import models
from tests.support import eventually
from topics.codec import decode_recommendation, encode, record_key
from topics.messages import BehaviorEvent

USERS = 40


@pytest.fixture
def two_versions(registry, tmp_path):
    """A registry of this test's own: the version that serves, and the same network under another name."""
    root = tmp_path / "models"
    shutil.copytree(registry, root)
    ours = Registry(root)
    first = ours.resolve("serving")
    staging = tmp_path / "staging"
    shutil.copytree(root / "versions" / first, staging)
    (staging / "manifest.json").unlink()
    second = f"{first}-next"
    ours.publish(staging, ours.manifest(first).model_copy(update={"version": second}))
    return ours, first, second


class Clicks:
    """One click of every user at a time, and which version answered it."""

    def __init__(self, parts) -> None:
        self._topics = parts.topics
        self._producer = KafkaProducer(bootstrap_servers=parts.kafka.bootstrap, linger_ms=0)
        self._consumer = KafkaConsumer(
            parts.topics.recommendations,
            bootstrap_servers=parts.kafka.bootstrap,
            group_id=None,
            auto_offset_reset="earliest",
        )
        self.sent: list[str] = []
        self.lists = {}

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._producer.close(timeout=5)
        self._consumer.close()

    def round(self) -> dict[int, str]:
        """user → version of the list that answers a new click."""
        events = [self._send(user) for user in range(USERS)]
        eventually(lambda: self._read() and all(event in self.lists for event in events), 30)
        return {self.lists[event].user_id: self.lists[event].model_version for event in events}

    def unanswered(self) -> set[str]:
        self._read()
        return set(self.sent) - set(self.lists)

    def _send(self, user: int) -> str:
        event = BehaviorEvent(
            event_id=f"{user}-{len(self.sent)}",
            user_id=user,
            item_id=len(self.sent) % 100,
            category_id=1,
            behavior="pv",
            timestamp=int(time.time()),
        )
        value, headers = encode(event)
        self._producer.send(self._topics.clicks, key=record_key(user), value=value, headers=headers)
        self.sent.append(event.event_id)
        return event.event_id

    def _read(self) -> bool:
        for found in self._consumer.poll(timeout_ms=50).values():
            for record in found:
                body = decode_recommendation(record.value, record.headers)
                assert body.degraded is None
                self.lists.update((click.event_id, body) for click in body.trigger.clicks)
        return True


def test_a_canary_is_promoted_and_rolled_back_under_load(parts, start_worker, two_versions):
    registry, first, second = two_versions
    worker = start_worker(options=["--registry", str(registry.root)])

    announced = ["--bootstrap", parts.kafka.bootstrap, "--topic-suffix", parts.topic_suffix]

    def command(*words: str, told: list[str] = announced) -> None:
        answer = CliRunner().invoke(models, [*words, "--registry", str(registry.root), *told])
        assert answer.exit_code == 0, answer.output
        assert "not announced" not in answer.output

    with Clicks(parts) as clicks:

        def until(versions: set[str]) -> dict[int, str]:
            """Clicks go on while the worker changes; the first round that shows what was wished."""
            deadline_s = time.monotonic() + 60
            while set((arms := clicks.round()).values()) != versions:
                assert time.monotonic() < deadline_s, worker.models()
            return arms

        assert set(clicks.round().values()) == {first}
        command("canary", second, "--percent", "50")
        until({first, second})  # the canary may have begun within this round
        arms = clicks.round()
        seen = defaultdict(set)
        for _ in range(3):
            for user, version in clicks.round().items():
                seen[user].add(version)
        assert seen == {user: {version} for user, version in arms.items()}
        assert USERS * 0.2 < sum(version == second for version in arms.values()) < USERS * 0.8
        command("shadow", second, "--percent", "100")
        until({first})
        eventually(lambda: clicks.round() and (worker.models()["shadow"] or {}).get("compared"), 60)
        assert worker.models()["shadow"]["overlap"] > 0.99
        command("promote", second)
        until({second})
        assert worker.readiness()["model"] == second
        assert worker.models()["last_check"]["failed"] == 0
        command("rollback")
        asked_s = time.monotonic()
        until({first})
        assert time.monotonic() - asked_s < 15
        command("promote", second, told=[])
        until({second})
        assert worker.metric("tailrace_releases_refused_total") == 0
        assert clicks.unanswered() == set()
