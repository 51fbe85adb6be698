"""`tailrace dead-letters replay --file`: a file that anybody may have edited."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from infra import clients
from infra.commands import dead_letters as commands
from infra.commands import lists
from infra.commands.dead_letters import dead_letters
from infra.printable import printable
from topics.messages import Recommendation, Trigger

GOOD = {"offset": 7, "topic": "clicks", "key": "5", "value": '{"user_id": 5}', "headers": [], "attempts": "2"}


class Producer:
    """Takes what kafka-python's does, and remembers it."""

    def __init__(self) -> None:
        self.sent = []

    def send(self, topic, **record):
        if not all(isinstance(value, bytes) for _, value in record["headers"]):
            raise TypeError("All headers items must be (str, bytes) tuples")
        self.sent.append((topic, record))
        return self

    def get(self, timeout):
        return None

    def close(self, timeout):
        return None


@pytest.fixture
def producer(monkeypatch):
    made = Producer()
    monkeypatch.setattr(clients, "producer", lambda *_, **__: made)
    return made


def replayed(tmp_path, *letters):
    file = tmp_path / "letters.jsonl"
    file.write_text("".join(f"{json.dumps(letter)}\n" for letter in letters))
    return CliRunner().invoke(dead_letters, ["replay", "--bootstrap", "x:1", "--file", str(file)])


def test_a_mended_letter_goes_back_with_its_users_key_and_its_attempts(producer, tmp_path):
    done = replayed(tmp_path, GOOD | {"key": "6"})
    assert done.exit_code == 0, done.output
    ((topic, record),) = producer.sent
    assert (topic, record["key"], record["headers"]) == ("clicks", b"5", [("attempts", b"2")])


def test_a_header_without_a_value_goes_back_with_an_empty_one(producer, tmp_path):
    done = replayed(tmp_path, GOOD | {"headers": [{"name": "trace", "value": None}]})
    assert done.exit_code == 0, done.output
    assert producer.sent[0][1]["headers"] == [("trace", b""), ("attempts", b"2")]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"topic": "model-releases"}, "it came from 'model-releases'"),
        ({"topic": ["clicks"]}, "it came from"),
        ({"topic": None}, "it came from"),
        ({"headers": 5}, "not iterable"),
        ({"headers": [1]}, "not subscriptable"),
        ({"headers": ["name"]}, "indices must be integers"),
        ({"headers": [{"value": "x"}]}, "KeyError('name')"),
        ({"headers": [{"name": "n", "value_base64": 5}]}, "TypeError"),
        ({"value_base64": "x%"}, "base64"),
    ],
)
def test_a_letter_of_another_form_is_a_sentence_that_says_how_far_it_came(
    producer, tmp_path, change, sentence
):
    done = replayed(tmp_path, GOOD, GOOD | {"offset": 8} | change)
    assert done.exit_code == 1
    assert "letter 8 is not as `list --json` writes them" in done.output
    assert sentence in done.output
    assert "1 before it were sent" in done.output
    assert isinstance(done.exception, SystemExit)
    assert len(producer.sent) == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;mine\x07", r"\x1b]0;mine\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("a\r\nb", r"a\r\nb"),
        ("\u202eevil", r"\u202eevil"),
        ("Käse 🧀", "Käse 🧀"),
    ],
)
def test_what_would_steer_a_terminal_is_escaped_and_letters_are_not(text, shown):
    assert printable(text) == shown


def test_a_letter_and_a_list_of_strangers_do_not_steer_the_terminal(monkeypatch, capsys):
    evil = "\x1b[2J"
    letter = {"offset": 1, "topic": "clicks", "partition": "0", "source_offset": "5", "reason": evil}
    monkeypatch.setattr(
        commands, "_letters", lambda *_: iter([{**letter, "detail": f"key {evil}", "value": f"{{{evil}"}])
    )
    done = CliRunner().invoke(dead_letters, ["list", "--bootstrap", "x:1"])
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output
    assert done.output.count(r"\x1b[2J") == 3
    lists._print(
        Recommendation(
            recommendation_id="r",
            user_id=7,
            trigger=Trigger(kind="request", request_id=evil),
            items=[],
            model_version=evil,
            engine="onnx",
            generated_at=0.0,
        ),
        as_json=False,
    )
    assert capsys.readouterr().out.count(r"\x1b[2J") == 2
