"""Commands around the stream, without servers."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from kafka.errors import KafkaTimeoutError

from infra import supervise as processes_beside
from infra.clients import BrokerUnavailable, Outgoing
from infra.commands.worker import worker


class FakeProducer:
    """Sends are futures whose results come one by one when they are waited for."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.unacknowledged = 0
        self.most = 0

    def send(self, topic, **record):
        self.unacknowledged += 1
        self.most = max(self.most, self.unacknowledged)
        return self

    def get(self, timeout):
        self.unacknowledged -= 1
        if self.error is not None:
            raise self.error


def test_what_is_on_its_way_is_bounded_and_all_of_it_is_waited_for():
    producer = FakeProducer()
    outgoing = Outgoing(producer, most=10)
    for number in range(100):
        outgoing.send("clicks", key=b"1", value=b"%d" % number)
    assert producer.most == 10
    outgoing.finish()
    assert producer.unacknowledged == 0


def test_a_record_that_is_not_taken_is_a_sentence_and_no_traceback():
    outgoing = Outgoing(FakeProducer(KafkaTimeoutError("60 s")))
    outgoing.send("clicks", key=b"1", value=b"{}")
    with pytest.raises(BrokerUnavailable, match="did not take a record"):
        outgoing.finish()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_wrong_setting_stops_the_start_of_one_process_and_of_many(processes, monkeypatch):
    def nothing_starts(*_):
        raise AssertionError("started")

    monkeypatch.setattr(processes_beside.subprocess, "Popen", nothing_starts)
    answer = CliRunner().invoke(
        worker,
        ["--workers", processes, "--bootstrap", "x:1", "--redis-url", "redis://x"],
        env={"STREAM_SESSION_TIMEOUT_MS": "nonsense"},
    )
    assert answer.exit_code == 1
    assert "a setting is wrong" in answer.output


def test_the_help_of_the_worker_says_when_it_ends_hard():
    answer = CliRunner().invoke(worker, ["--help"])
    assert "STREAM_CLOSE_TIMEOUT_MS" in answer.output
    assert "exit code 75" in " ".join(answer.output.split())
