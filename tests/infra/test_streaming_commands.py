"""replay, recommend and watch as a person runs them, against a real broker and worker."""

from __future__ import annotations

import gzip
import json

import orjson
import pytest
from click.testing import CliRunner

from infra.clients import everything, reader
from infra.commands.lists import recommend, watch
from infra.commands.replay import replay
from infra.commands.worker import worker as worker_command
from tests.models import small_log

ROWS = b"""\xef\xbb\xbf1,10,3,pv,1511600000\r
1,11,3,cart,1511600010\r
"2",12,3,"buy",1511600020
2,13,3
x,14,3,pv,1511600040
3,-1,3,pv,1511600050
3,15,3,stare,1511600060
3,16,3,fav,1511600070
"""


def run(command, *arguments):
    return CliRunner().invoke(command, arguments, catch_exceptions=False)


def sent(parts):
    consumer = reader(parts.kafka.bootstrap, parts.topics.clicks)
    records = [(record.key, orjson.loads(record.value)) for record in everything(consumer)]
    consumer.close()
    return records


def on(parts):
    return ["--bootstrap", parts.kafka.bootstrap, "--topic-suffix", parts.topic_suffix]


def test_replay_sends_the_good_rows_in_order_and_names_the_lines_of_the_bad_ones(parts, tmp_path):
    log = tmp_path / "log.csv"
    log.write_bytes(ROWS)
    done = run(replay, str(log), *on(parts))
    assert done.exit_code == 0
    assert "4 clicks" in done.output
    for line in ("line 4", "line 5", "line 6", "line 7"):
        assert line in done.output
    assert {(key, body["item_id"], body["behavior"]) for key, body in sent(parts)} == {
        (b"1", 10, "pv"),
        (b"1", 11, "cart"),
        (b"2", 12, "buy"),
        (b"3", 16, "fav"),
    }


def test_replay_of_a_log_cut_in_the_middle_sends_what_is_there_and_says_so(parts, tmp_path):
    whole = gzip.compress(small_log(tmp_path / "whole.csv").read_bytes())
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    done = run(replay, str(cut), *on(parts), "--json")
    summary = json.loads(done.stdout)
    assert done.exit_code == 0
    assert summary["truncated"]
    assert 0 < summary["clicks"] < 6_000
    assert len(sent(parts)) == summary["clicks"]


def test_replay_of_an_empty_log_is_an_error_that_says_what_to_do(parts, tmp_path):
    empty = tmp_path / "empty.csv"
    empty.touch()
    done = run(replay, str(empty), *on(parts))
    assert done.exit_code == 1
    assert "tailrace synth" in done.output


def test_replay_keeps_its_rate(parts, tmp_path):
    log = small_log(tmp_path / "log.csv")
    done = run(replay, str(log), *on(parts), "--rate", "400", "--limit", "200", "--json")
    summary = json.loads(done.stdout)
    assert summary["clicks"] == 200
    assert 0.49 < summary["seconds"] < 5


@pytest.mark.timeout(10)  # kafka-python by itself asks for 30 s
@pytest.mark.parametrize("words", [["recommend", "7"], ["watch"], ["dead-letters", "list"]])
def test_a_broker_that_is_away_is_one_sentence_at_once(words):
    from infra.cli import main

    done = CliRunner().invoke(main, [*words, "--bootstrap", "localhost:1"])
    assert done.exit_code == 1
    assert "tailrace up" in done.output
    assert "Traceback" not in done.output


def test_recommend_asks_once_and_watch_follows(parts, start_worker, tmp_path):
    start_worker()
    log = small_log(tmp_path / "log.csv")
    run(replay, str(log), *on(parts), "--limit", "50")
    seen = run(watch, *on(parts), "--from-start", "--limit", "50", "--json")
    lists = [json.loads(line) for line in seen.stdout.splitlines()]
    assert len({body["recommendation_id"] for body in lists}) == 50
    user = lists[-1]["user_id"]
    asked = run(recommend, str(user), *on(parts), "--k", "3", "--json")
    answer = json.loads(asked.stdout)
    assert answer["trigger"]["kind"] == "request"
    assert len(answer["items"]) == 3
    mine = run(watch, *on(parts), "--from-start", "--user", str(user), "--limit", "1")
    assert f"user {user}" in mine.output


def test_recommend_without_a_worker_says_so(parts):
    done = run(recommend, "7", *on(parts), "--timeout-s", "0.5")
    assert done.exit_code == 1
    assert "tailrace worker" in done.output


def test_a_wrong_setting_stops_the_worker_with_a_sentence(monkeypatch):
    monkeypatch.setenv("STREAM_MAX_IN_FLIGHT", "many")
    done = CliRunner().invoke(worker_command, [])
    assert done.exit_code == 1
    assert "max_in_flight" in done.output.lower()
