"""Settings and addresses that are wrong are sentences which name the variable or the option."""

from __future__ import annotations

import os
import socket
import sys

import click
import pytest
from click.testing import CliRunner
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from features.settings import FeatureSettings
from inference.admission.settings import AdmissionSettings
from inference.settings import InferenceSettings
from infra.cli import main
from infra.commands import settings
from infra.commands.replay import replay
from infra.commands.retraining import retrain
from infra.commands.serve import serve
from infra.commands.worker import worker
from infra.local.server import HOST, free_port
from infra.retraining import schedule
from stream.settings import StreamSettings
from topics import admin


class Rooms(BaseSettings):
    """Settings of these tests."""

    model_config = SettingsConfigDict(env_prefix="HOTEL_", frozen=True)

    rooms: int = Field(default=3, ge=1)
    floors: tuple[int, ...] = (1, 2)


def test_what_is_given_wins_over_the_environment_and_that_over_the_default(monkeypatch):
    monkeypatch.setenv("HOTEL_ROOMS", "7")
    assert settings.read(Rooms) == Rooms(rooms=7)
    assert settings.read(Rooms, rooms=8).rooms == 8
    assert settings.read(Rooms, floors=(3,)).rooms == 7


@pytest.mark.parametrize(
    ("kind", "variable", "value", "sentence"),
    [
        (Rooms, "HOTEL_ROOMS", "many", "HOTEL_ROOMS should be a valid integer"),
        (Rooms, "HOTEL_ROOMS", "0", "HOTEL_ROOMS should be greater than or equal to 1, not '0'"),
        (Rooms, "HOTEL_FLOORS", "1,2", "HOTEL_FLOORS is not JSON"),
        (Rooms, "HOTEL_FLOORS", '[1,"x"]', "HOTEL_FLOORS.1 should be a valid integer"),
        (AdmissionSettings, "ADMISSION_TIERS", "gold", "ADMISSION_TIERS is not JSON"),
        (AdmissionSettings, "ADMISSION_DEFAULT_TIER", "gold", "ADMISSION_*: the default tier 'gold' is none"),
        (InferenceSettings, "INFERENCE_LANES", "abacus", "INFERENCE_*: no engine is called 'abacus'"),
        (FeatureSettings, "FEATURES_SEEN_FILTER", "all", "FEATURES_SEEN_FILTER should be 'none', 'bought'"),
        (StreamSettings, "STREAM_GROUP", "", "STREAM_GROUP"),
    ],
)
def test_a_wrong_value_is_a_sentence_that_names_its_variable(kind, variable, value, sentence, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(click.ClickException) as refused:
        settings.read(kind)
    assert sentence in refused.value.message
    assert "pydantic" not in refused.value.message


def test_of_a_tier_that_is_wrong_only_that_is_said(monkeypatch):
    monkeypatch.setenv("ADMISSION_TIERS", '[{"name": "gold", "rate": -1}]')
    with pytest.raises(click.ClickException) as refused:
        settings.read(AdmissionSettings)
    assert refused.value.message.splitlines()[1:] == [
        "  ADMISSION_TIERS.0.rate should be greater than 0, not -1"
    ]


@pytest.mark.parametrize(
    "command", [["worker"], ["tiers", "show", "7"], ["serve"], ["retrain", "--log", __file__]]
)
@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "redis://u:secret@host:port/0"])
def test_what_is_no_address_of_a_redis_is_refused_and_not_repeated(command, url):
    done = CliRunner().invoke(main, [*command, "--redis-url", url])
    assert done.exit_code == 2
    assert "redis://HOST:PORT/DATABASE" in done.output
    assert "secret" not in done.output


@pytest.mark.parametrize("option", ["--rate", "--speed"])
@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_pace_is_a_finite_number(option, number):
    done = CliRunner().invoke(replay, [__file__, option, number])
    assert done.exit_code == 2
    assert "is not a finite number" in done.output


def test_minutes_of_training_are_a_finite_number():
    done = CliRunner().invoke(retrain, ["--log", __file__, "--max-minutes", "nan"])
    assert done.exit_code == 2
    assert "is not a finite number" in done.output


@pytest.fixture
def taken():
    with socket.create_server((HOST, 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("command", [["worker"], ["retrain", "--topic", "clicks", "--schedule", "0 * * * *"]])
def test_a_taken_port_of_the_probes_is_a_sentence_before_anything_starts(taken, command):
    done = CliRunner().invoke(main, [*command, "--http-port", str(taken), "--bootstrap", "x:1"])
    assert done.exit_code == 1
    assert f"probes cannot listen on {HOST}:{taken} (Address already in use)" in done.output


def test_a_worker_without_a_broker_ends_with_a_sentence():
    absent = f"{HOST}:{free_port()}"
    done = CliRunner().invoke(main, ["worker", "--http-port", "0", "--bootstrap", absent])
    assert done.exit_code == 1
    assert done.output.splitlines() == [
        f"Error: no Kafka broker listens at {absent}; `tailrace up` starts one"
    ]


@pytest.mark.parametrize(
    ("command", "ports", "variable"),
    [
        (worker, ["--http-port", "0"], "TAILRACE_REDIS_URL"),
        (serve, [], "SERVE_REDIS_URL"),
    ],
)
def test_a_child_is_told_what_was_told_but_the_address_of_redis_is_on_no_command_line(
    command, ports, variable, monkeypatch
):
    started = []
    module = sys.modules[command.callback.__module__]
    monkeypatch.setattr(module, "supervise", lambda commands, *_: started.extend(commands) or 0)
    monkeypatch.setattr(sys.modules[serve.callback.__module__], "is_free", lambda _: True)
    monkeypatch.setattr(admin, "topic_epochs", lambda *_: {})
    monkeypatch.setenv(variable, "redis://elsewhere/0")
    told = ["--workers", "2", *ports, "--engine", "numpy", "--redis-url", "redis://u:secret@h/0"]
    done = CliRunner().invoke(command, told)
    assert done.exit_code == 0, done.output
    assert len(started) == 2
    assert all(words[words.index("--engine") + 1] == "numpy" for words in started)
    assert "--workers" not in started[0] + started[1]
    assert "secret" not in " ".join(word for command in started for word in command)
    assert os.environ[variable] == "redis://u:secret@h/0"


@pytest.mark.integration
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_worker_without_topics_ends_with_a_sentence(workers, bootstrap):
    options = ("--topic-suffix", ".nobodys", "--http-port", "0", "--workers", workers)
    done = CliRunner().invoke(main, ["worker", "--bootstrap", bootstrap, *options])
    assert done.exit_code == 1
    assert "there is no topic 'clicks.nobodys'" in done.output and "tailrace up" in done.output
    assert "Traceback" not in done.output


@pytest.mark.integration
def test_a_replay_without_topics_ends_with_a_sentence(bootstrap, tmp_path):
    log = tmp_path / "clicks.csv"
    log.write_text("1,2,3,pv,1511600000\n")
    done = CliRunner().invoke(
        main, ["replay", str(log), "--bootstrap", bootstrap, "--topic-suffix", ".nobodys"]
    )
    assert done.exit_code == 1
    assert "no topic 'clicks.nobodys'" in done.output
    assert "`tailrace up` creates the topics" in done.output


def test_the_service_of_retraining_tells_its_runs_where_redis_is_and_nobody_else(monkeypatch, tmp_path):
    told = []

    class Service:
        def __init__(self, cron, command, runs, alias):
            told.extend(command)

        async def run(self, host, port):
            return 0

    monkeypatch.setattr(schedule, "Service", Service)
    monkeypatch.setenv("RETRAIN_REDIS_URL", "redis://elsewhere/0")
    words = ["--topic", "clicks", "--schedule", "0 * * * *", "--runs", str(tmp_path)]
    done = CliRunner().invoke(retrain, [*words, "--redis-url", "redis://u:secret@h/0"])
    assert done.exit_code == 0, done.output
    assert "secret" not in " ".join(told)
    assert os.environ["RETRAIN_REDIS_URL"] == "redis://u:secret@h/0"


def refused(tmp_path, **told):
    words = [word for name, value in told.items() for word in (f"--{name}", str(value))]
    given = {"--registry": tmp_path / "models", "--runs": tmp_path / "runs"}
    words += [str(word) for pair in given.items() if pair[0] not in words for word in pair]
    done = CliRunner().invoke(retrain, words)
    assert done.exit_code in (1, 2)
    assert isinstance(done.exception, SystemExit)
    return done.output


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "clicks.csv"
    path.write_text("1,2,3,pv,1511600000\n")
    return path


def test_a_limit_of_the_gate_that_does_not_parse_is_said_before_the_training(log, monkeypatch, tmp_path):
    monkeypatch.setenv("GATE_MARGIN", "two")
    assert "GATE_MARGIN should be a valid number" in refused(tmp_path, log=log)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("option", ["registry", "runs"])
def test_a_folder_that_cannot_be_written_is_said_before_the_training(option, log, tmp_path):
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / option
    assert f"{folder} cannot be written: Not a directory" in refused(tmp_path, log=log, **{option: folder})


def test_a_run_that_was_never_begun_is_named(tmp_path):
    assert "there is no run 'nightly' in" in refused(tmp_path, run="nightly")


def test_an_alias_that_is_no_name_is_said_before_the_training(log, tmp_path):
    assert "'../serving' is not a version or alias" in refused(tmp_path, log=log, alias="../serving")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("user", ["u", ""])
def test_a_password_is_not_shown_on_the_screen(user, monkeypatch, tmp_path):
    monkeypatch.setenv("TAILRACE_HOME", str(tmp_path))
    monkeypatch.setenv("TAILRACE_REDIS_URL", f"redis://{user}:secret@redis.example:6379/0")
    done = CliRunner().invoke(main, ["status"])
    assert f"redis://{user}:***@redis.example:6379/0" in done.output
    assert "secret" not in done.output
