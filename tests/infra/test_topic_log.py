"""Clicks of a topic between two sets of offsets, as a log."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient

from compression.logs.log_reader import LogInvalid, iter_events
from compression.releases.registry import Registry
from infra.commands.retraining import retrain
from infra.retraining.topic_log import TopicLog, bounds_now
from tests.compression.small_retraining import short_log
from tests.support import eventually
from topics.admin import ensure_topics
from topics.codec import encode, record_key


def nothing(_: float) -> None:
    pass


@pytest.fixture
def clicks(bootstrap, make_topics, tmp_path):
    """Sends the short log's clicks to a topic of its own; `clicks(first, last)` sends some of them."""
    topic = make_topics(partitions=3)["clicks"]
    events = list(iter_events(short_log(tmp_path / "clicks.csv")))

    def send(first: int, last: int, *others: bytes) -> None:
        producer = KafkaProducer(bootstrap_servers=bootstrap)
        for event in events[first:last]:
            producer.send(topic.name, key=record_key(event.user_id), value=encode(event)[0])
        for value in others:
            producer.send(topic.name, key=b"1", value=value)
        producer.flush()
        producer.close()

    send.topic, send.events, send.log = topic, events, tmp_path / "clicks.csv"
    return send


def test_the_topic_gives_the_sequences_that_the_file_gives(clicks, bootstrap):
    from compression.logs.dataset import read_log

    clicks(0, 3_000, b"not json", b"[]", b'{"user_id": 1}')
    source = TopicLog(bootstrap, bounds_now(bootstrap, clicks.topic.name))
    read = source.read(10**6, nothing)
    expected = read_log(clicks.log).sequences
    for column in ("users", "offsets", "items", "categories", "behaviors", "timestamps"):
        assert np.array_equal(getattr(read.sequences, column), getattr(expected, column)), column
    assert read.report.bad_rows == 3
    assert read.report.reasons == {"not-json": 1, "not-an-object": 1, "missing-field": 1}
    told = source.provenance()
    assert sum(told["end_offsets"].values()) == 3_003
    assert sum(told["start_offsets"].values()) == 0


def test_what_came_after_the_bounds_is_not_read_and_the_next_begins_there(clicks, bootstrap):
    clicks(0, 1_000)
    first = bounds_now(bootstrap, clicks.topic.name)
    clicks(1_000, 1_500)
    assert len(TopicLog(bootstrap, first).read(10**6, nothing).sequences) == 1_000
    second = bounds_now(bootstrap, clicks.topic.name, first)
    assert second.start == first.end
    read = TopicLog(bootstrap, second).read(10**6, nothing).sequences
    assert sorted(read.items) == sorted(event.item_id for event in clicks.events[1_000:1_500])


def test_of_too_many_the_newest_are_read_and_the_rest_is_not_asked_for(clicks, bootstrap):
    clicks(0, 3_000)
    source = TopicLog(bootstrap, bounds_now(bootstrap, clicks.topic.name))
    read = source.read(600, nothing)
    assert len(read.sequences) == pytest.approx(600, abs=3)
    assert read.left_out == 3_000 - len(read.sequences)
    told = source.provenance()
    assert sum(told["end_offsets"].values()) - sum(told["start_offsets"].values()) == len(read.sequences)
    assert read.sequences.timestamps.min() > np.median([event.timestamp for event in clicks.events])


def test_a_topic_without_clicks_and_one_that_was_made_anew_are_sentences(clicks, bootstrap):
    empty = bounds_now(bootstrap, clicks.topic.name)
    with pytest.raises(LogInvalid, match="no click"):
        TopicLog(bootstrap, empty).read(10**6, nothing)
    admin = KafkaAdminClient(bootstrap_servers=bootstrap)
    admin.delete_topics([clicks.topic.name])
    eventually(lambda: clicks.topic.name not in admin.list_topics())
    admin.close()
    ensure_topics(bootstrap, [clicks.topic])
    with pytest.raises(LogInvalid, match="anew"):
        TopicLog(bootstrap, empty).read(10**6, nothing)
    with pytest.raises(LogInvalid, match="anew"):
        bounds_now(bootstrap, clicks.topic.name, empty)


def test_a_run_from_the_topic_is_repeated_exactly_and_added_to(clicks, bootstrap, redis_url, tmp_path):
    def run(name, *options):
        told = ["--bootstrap", bootstrap, "--redis-url", redis_url, "--runs", tmp_path / "runs", "--json"]
        words = [*told, "--registry", tmp_path / "models", "--run", name, "--alias", "ours", *options]
        answer = CliRunner().invoke(retrain, [str(word) for word in words])
        assert answer.exit_code == 0, answer.output
        return json.loads(answer.stdout)

    recipe = ("--recipe", "tiny", "--epochs", 2, "--max-minutes", 30)
    suffix = clicks.topic.name.removeprefix("clicks")
    topic = ("--topic", "clicks", "--topic-suffix", suffix)
    clicks(0, 2_000)
    first = run("first", *topic, *recipe)
    clicks(2_000, 3_000)
    again = run("again", "--repeat", "first", "--topic-suffix", suffix)
    assert again["version"] != first["version"]
    for name in ("start_offsets", "end_offsets", "topic_epoch", "events"):
        assert again["data"][name] == first["data"][name]
    registry = Registry(tmp_path / "models")
    files = [registry.manifest(done["version"]).files for done in (first, again)]
    assert files[0] == files[1]
    assert again["announced"]
    added = run("added", *topic, *recipe, "--from", "last", "--from-serving")
    assert added["data"]["start_offsets"] == first["data"]["end_offsets"]
    assert added["data"]["started_from"] == again["version"]
    assert added["model"]["item_rows"] >= again["model"]["item_rows"]
    before = registry.open(again["version"]).vocabulary().item_ids
    now = registry.open("ours").vocabulary().item_ids
    new = {event.item_id for event in clicks.events[2_000:]}
    assert set(now.tolist()) == set(before.tolist()) | new
    page = (tmp_path / "runs" / "added" / "report.html").read_text()
    assert page.count("<svg") >= 3 and again["version"] in page and "http" not in page.split("<svg")[0]
