"""The story: events in, lists out, a click changes them; then a release, without a restart."""

from __future__ import annotations

import shutil
import time

import orjson
import psutil
from kafka import KafkaConsumer, KafkaProducer

from infra.bench.load import records
from tests.models import small_log
from tests.support import eventually
from topics.codec import decode_recommendation, encode, record_key
from topics.messages import BehaviorEvent, ModelReleased, RecommendRequest


def click(user_id: int, item_id: int, category_id: int = 1, **changes) -> BehaviorEvent:
    fields = {
        "event_id": f"{user_id}-{item_id}-{time.monotonic_ns()}",
        "user_id": user_id,
        "item_id": item_id,
        "category_id": category_id,
        "behavior": "pv",
        "timestamp": int(time.time()),
    }
    return BehaviorEvent(**{**fields, **changes})


class Shop:
    """A producer of clicks and a consumer of lists, as a user of Tailrace would write them."""

    def __init__(self, parts) -> None:
        self.topics = parts.topics
        self._producer = KafkaProducer(bootstrap_servers=parts.kafka.bootstrap, linger_ms=0)
        self._consumer = KafkaConsumer(
            self.topics.recommendations,
            bootstrap_servers=parts.kafka.bootstrap,
            group_id=None,
            auto_offset_reset="earliest",
        )
        self.lists = []

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._producer.close(timeout=5)
        self._consumer.close()

    def send(self, message, topic=None, key=None) -> None:
        value, headers = encode(message)
        key = record_key(message.user_id) if key is None else key
        self._producer.send(topic or self.topics.clicks, key=key, value=value, headers=headers).get(10)

    def raw(self, key, value) -> None:
        self._producer.send(self.topics.clicks, key=key, value=value).get(10)

    def answer(self, event: BehaviorEvent):
        """Send a click and wait for the list that answers it."""
        self.send(event)
        return eventually(lambda: self._find(lambda body: _answers(body, event.event_id)), 30)

    def ask(self, **fields):
        request = RecommendRequest(**fields)
        self.send(request, self.topics.requests)
        return eventually(lambda: self._find(lambda b: b.trigger.request_id == request.request_id), 30)

    def _find(self, wanted):
        for found in self._consumer.poll(timeout_ms=50).values():
            self.lists.extend(decode_recommendation(record.value, record.headers) for record in found)
        return next((body for body in self.lists if wanted(body)), None)


def _answers(body, event_id: str) -> bool:
    return any(answered.event_id == event_id for answered in body.trigger.clicks)


def test_a_click_is_answered_by_the_model_and_the_next_click_changes_the_list(parts, start_worker, tmp_path):
    start_worker()
    events = list(_some_events(tmp_path, 40))
    with Shop(parts) as shop:
        for event in events[:-1]:
            shop.send(event)
        first = shop.answer(events[-1])
        other = next(e for e in events if e.category_id != events[-1].category_id)
        second = shop.answer(click(first.user_id, other.item_id, other.category_id))
    assert first.degraded is None
    assert first.engine == "onnx"
    assert first.model_version != "none"
    assert len(first.items) == 10
    assert [item.item_id for item in first.items] != [item.item_id for item in second.items]
    assert second.trigger.clicks[0].item_id == other.item_id
    assert first.items == sorted(first.items, key=lambda item: -item.score)
    assert {"wait", "rank"} <= set(first.timings_ms)


def test_requests_are_answered_with_their_k_candidates_and_excludes(parts, start_worker, tmp_path):
    start_worker()
    with Shop(parts) as shop:
        for event in _some_events(tmp_path, 60):
            shop.send(event)
        user = shop.answer(_some_events(tmp_path, 61)[-1]).user_id
        long = shop.ask(request_id="long", user_id=user, k=1000)
        banned = long.items[0].item_id
        without = shop.ask(request_id="without", user_id=user, k=5, exclude=[banned])
        chosen = shop.ask(request_id="chosen", user_id=user, candidates=[3, 1, 2**62])
        none = shop.ask(request_id="none", user_id=user, candidates=[])
        stranger = shop.ask(request_id="stranger", user_id=2**62)
    assert 0 < len(long.items) <= 1000
    assert banned not in [item.item_id for item in without.items]
    assert len(without.items) == 5
    assert sorted(item.item_id for item in chosen.items) == [1, 3, 2**62]
    assert none.items == []
    assert stranger.items


def test_a_release_reaches_the_running_worker(parts, registry, start_worker, tmp_path):
    from compression.releases.registry import Registry

    version = Registry(registry).resolve("serving")
    empty = tmp_path / "models"
    worker = start_worker(environment={"STREAM_REGISTRY": str(empty)}, options=["--registry", str(empty)])
    assert worker.readiness()["model"] == "none"
    with Shop(parts) as shop:
        before = shop.answer(click(1, 5))
        shutil.copytree(registry, empty)
        digest = Registry(registry).manifest_sha256(version)
        good = ModelReleased(version=version, uri="models", sha256=digest, stage="serving")
        forged = good.model_copy(update={"sha256": "0" * 64})
        shop.send(forged, shop.topics.releases, key=b"serving")
        shop.send(good, shop.topics.releases, key=b"staging")
        still = shop.answer(click(1, 7))
        shop.send(good, shop.topics.releases, key=b"serving")
        eventually(lambda: worker.readiness()["model"] == version, 30)
        after = shop.answer(click(1, 6))
    assert before.degraded == still.degraded == "popular"
    assert after.degraded is None
    assert after.model_version == version


def test_bad_records_are_dead_letters_and_can_be_mended_and_replayed(parts, start_worker, tmp_path):
    from click.testing import CliRunner

    from infra.commands.dead_letters import dead_letters

    worker = start_worker()
    pid = worker.pid
    good = orjson.loads(encode(click(7, 70))[0])
    bad = {
        "not-json": (b"7", b"{"),
        "tombstone": (b"7", None),
        "invalid-field": (b"7", orjson.dumps({**good, "behavior": "stare", "event_id": "mend-me"})),
        "key-mismatch": (b"8", orjson.dumps(good)),
        "empty-key": (None, orjson.dumps(good)),
        "too-large": (b"7", orjson.dumps({**good, "pad": "x" * 100_000})),
        "timestamp-unit": (b"7", orjson.dumps({**good, "timestamp": good["timestamp"] * 1000})),
    }
    common = ["--bootstrap", parts.kafka.bootstrap, "--topic-suffix", parts.topic_suffix]
    run = CliRunner().invoke
    with Shop(parts) as shop:
        for key, value in bad.values():
            shop.raw(key, value)
        shop.answer(click(7, 71))

        def letters():
            lines = run(dead_letters, ["list", *common, "--json"], catch_exceptions=False).output.splitlines()
            return {letter["reason"]: letter for letter in map(orjson.loads, lines)}

        assert set(eventually(lambda: len(letters()) == len(bad) and letters(), 30)) == set(bad)
        letter = letters()["invalid-field"]
        letter["value"] = letter["value"].replace("stare", "buy")
        mended = tmp_path / "mended.jsonl"
        mended.write_bytes(orjson.dumps(letter))
        replayed = run(dead_letters, ["replay", *common, "--file", str(mended)], catch_exceptions=False)
        assert "1 letters sent" in replayed.output
        answer = eventually(lambda: shop._find(lambda body: _answers(body, "mend-me")), 30)
    assert answer.user_id == 7
    assert worker.pid == pid


def test_two_workers_share_the_partitions_and_one_leaving_loses_nothing(parts, start_worker, tmp_path):
    from infra.bench.load import Account, Collecting, poisson, send

    first, second = start_worker(), start_worker()
    events = _some_events(tmp_path, 1_200)
    clicks = records(events)
    bootstrap = parts.kafka.bootstrap
    with Collecting(bootstrap, parts.topics.recommendations, tmp_path) as collecting:
        send(bootstrap, parts.topics.clicks, clicks[:600], poisson(600, 400, 1))
        collecting.wait(600, quiet_s=30)
        assert first.metric("tailrace_clicks_total") > 0
        assert second.metric("tailrace_clicks_total") > 0
        first.stop()
        send(bootstrap, parts.topics.clicks, clicks[600:], poisson(600, 400, 2))
        collecting.wait(1_200, quiet_s=30)
        account = Account.of(1_200, collecting.finish())
    assert (account.lost, account.other_ids) == (0, 0)


def test_sigterm_drains_what_is_in_hand_and_commits_it(parts, start_worker, tmp_path):
    from infra.bench.load import Account, Collecting, poisson, send

    worker = start_worker("drained")
    events = _some_events(tmp_path, 2_000)
    bootstrap = parts.kafka.bootstrap
    with Collecting(bootstrap, parts.topics.recommendations, tmp_path) as collecting:
        send(bootstrap, parts.topics.clicks, records(events), poisson(2_000, 0, 1))
        eventually(lambda: collecting.count > 50, 30)
        began_s = time.monotonic()
        worker.stop()
        assert time.monotonic() - began_s < 15
        start_worker("drained")
        collecting.wait(2_000, quiet_s=30)
        account = Account.of(2_000, collecting.finish())
    assert (account.lost, account.ranked_again, account.other_ids) == (0, 0, 0)


def _some_events(folder, count: int) -> list[BehaviorEvent]:
    from itertools import islice

    from compression.logs.log_reader import iter_events

    path = folder / "clicks.csv"
    if not path.exists():
        small_log(path)
    return list(islice(iter_events(path), count))


def test_several_processes_of_one_command_serve_together_and_a_killed_one_comes_back(
    parts, start_worker, tmp_path
):
    from infra.bench.load import Account, Collecting, poisson, send

    supervisor = start_worker("pair", options=["--workers", "2"])
    processes = psutil.Process(supervisor.pid)
    eventually(lambda: len(_workers(processes)) == 2, 30)
    clicks = records(_some_events(tmp_path, 600))
    bootstrap = parts.kafka.bootstrap
    with Collecting(bootstrap, parts.topics.recommendations, tmp_path) as collecting:
        send(bootstrap, parts.topics.clicks, clicks[:300], poisson(300, 300, 1))
        killed = _workers(processes)[1]
        killed.kill()
        eventually(lambda: len(_workers(processes)) == 2 and killed not in _workers(processes), 30)
        send(bootstrap, parts.topics.clicks, clicks[300:], poisson(300, 300, 2))
        collecting.wait(600, quiet_s=30)
        account = Account.of(600, collecting.finish())
    assert (account.lost, account.other_ids) == (0, 0)


def _workers(supervisor: psutil.Process) -> list[psutil.Process]:
    return [child for child in supervisor.children() if _lives(child)]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
