"""The whole model loop: clicks answered with what is popular, a model learnt from them, the same worker
ranks with it, and users find more of what they click on in their lists."""

from __future__ import annotations

import json

from click.testing import CliRunner
from kafka import KafkaProducer

from compression.logs.log_reader import iter_events
from infra.clients import reader, to_the_end
from infra.commands.retraining import retrain
from infra.online import lists_since, online_hits
from tests.compression.small_retraining import short_log
from tests.support import eventually
from topics.codec import encode, record_key

LEARN = 2_500


def test_a_worker_without_a_model_has_one_from_its_own_topic_and_its_lists_are_better(
    parts, start_worker, tmp_path
):
    registry = tmp_path / "models"
    worker = start_worker(options=["--registry", str(registry), "--k", "20"])
    assert worker.readiness()["model"] == "none"
    events = list(iter_events(short_log(tmp_path / "clicks.csv")))
    consumer = reader(parts.kafka.bootstrap, parts.topics.recommendations)
    start = to_the_end(consumer)
    consumer.close()
    producer = KafkaProducer(bootstrap_servers=parts.kafka.bootstrap, linger_ms=5)

    def send(first: int, last: int) -> dict[str, list[int]]:
        """The lists that answer these clicks, and those before."""
        for event in events[first:last]:
            value, headers = encode(event)
            producer.send(parts.topics.clicks, key=record_key(event.user_id), value=value, headers=headers)
        producer.flush()
        eventually(lambda: worker.metric("tailrace_lists_total") >= last, 60, what="lists")
        due = {event.event_id for event in events[:last]}

        def answered() -> dict[str, list[int]]:
            found = lists_since(parts.kafka.bootstrap, parts.topics.recommendations, start)
            return found if due <= set(found) else {}

        return eventually(answered, 30, what="a list for every click")

    def hits(lists: dict[str, list[int]], first: int, last: int) -> float:
        return online_hits(((event.event_id, event) for event in events[first:last]), lists, 20).rate

    before = hits(send(0, LEARN), LEARN - 500, LEARN)
    told = ["--bootstrap", parts.kafka.bootstrap, "--redis-url", parts.redis.url, "--registry", registry]
    told += ["--topic-suffix", parts.topic_suffix, "--runs", tmp_path / "runs", "--topic", "clicks", "--json"]
    answer = CliRunner().invoke(retrain, [str(word) for word in [*told, "--recipe", "tiny", "--epochs", 8]])
    assert answer.exit_code == 0, answer.output
    done = json.loads(answer.stdout)
    assert (done["data"]["events"], done["data"]["bad_rows"], done["announced"]) == (LEARN, 0, True)
    eventually(lambda: worker.readiness()["model"] == done["version"], 30)
    lists = send(LEARN, len(events))
    producer.close()
    assert hits(lists, LEARN, len(events)) > 1.3 * before
