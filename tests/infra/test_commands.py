"""`tailrace` as a person runs it: in processes of its own, with a home of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from infra.cli import COMMANDS
from infra.local import stack
from infra.local.endpoints import Endpoints, endpoints
from infra.local.kafka import ensure_jars
from infra.local.server import HOST, free_port
from topics.admin import ensure_topics

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with the checkout's jars, so that Maven does not fetch them again."""
    jars = ensure_jars()
    home = tmp_path / "home"
    home.mkdir()
    (home / "kafka").symlink_to(jars.parent)
    monkeypatch.setenv("TAILRACE_HOME", str(home))
    monkeypatch.delenv("TAILRACE_BOOTSTRAP", raising=False)
    monkeypatch.delenv("TAILRACE_REDIS_URL", raising=False)
    return home


@pytest.fixture
def tailrace(home: Path) -> Iterator[Run]:
    def run(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "infra.cli", *words],
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )

    yield run
    run("down")


def status(tailrace: Run) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(tailrace("status", "--json").stdout)
    return answer


def pids(answer: dict[str, Any]) -> dict[str, int]:
    return {server["name"]: server["pid"] for server in answer["servers"]}


@pytest.mark.integration
def test_up_twice_starts_once_and_down_stops_only_its_own(tailrace: Run, redis_server: Any) -> None:
    ports = ["--kafka-port", str(free_port()), "--redis-port", str(free_port())]
    first = tailrace("up", *ports, "--json")
    assert first.returncode == 0, first.stderr
    started = status(tailrace)
    second = tailrace("up")
    assert second.returncode == 0, second.stderr
    assert pids(status(tailrace)) == pids(started)
    assert [server["running"] for server in started["servers"]] == [True, True]
    up = json.loads(first.stdout)
    assert up["endpoints"] == {name: started[name] for name in ("bootstrap", "redis_url")}
    assert up["endpoints"]["bootstrap"].endswith(ports[1])
    assert not any(topic.created for topic in ensure_topics(started["bootstrap"]))
    with redis.Redis.from_url(started["redis_url"]) as client:
        client.set("kept", "yes")

    assert "kafka, redis" in tailrace("down").stdout
    assert not any(psutil.pid_exists(server["pid"]) for server in started["servers"])
    with redis.Redis.from_url(redis_server.url) as stranger:
        assert stranger.ping()
    assert tailrace("status").returncode == 1
    assert "nothing of ours" in tailrace("down").stdout

    again = tailrace("up", *ports)
    assert again.returncode == 0, again.stderr
    with redis.Redis.from_url(started["redis_url"]) as client:
        assert client.get("kept") == b"yes"


@pytest.mark.integration
@pytest.mark.parametrize("name", ["kafka", "redis"])
def test_a_taken_port_that_was_asked_for_is_an_error_and_nothing_is_left_running(
    tailrace: Run, name: str
) -> None:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        port = listener.getsockname()[1]
        refused = tailrace("up", f"--{name}-port", str(port))
    assert refused.returncode == 1
    assert f"port {port} for {name} is taken" in refused.stderr
    assert not any(server["running"] for server in status(tailrace)["servers"])


def test_a_taken_default_port_is_replaced_and_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        taken = listener.getsockname()[1]
        port, note = stack.choose_port("redis", None, taken)
    assert port != taken
    assert str(taken) in note and str(port) in note


def test_where_nothing_was_started_the_status_makes_up_no_ports(home: Path) -> None:
    assert [(server.name, server.address, server.running) for server in stack.status()] == [
        ("kafka", "-", False),
        ("redis", "-", False),
    ]


@pytest.mark.integration
def test_doctor_is_content_here(tailrace: Run) -> None:
    said = tailrace("doctor", "--json")
    assert said.returncode == 0, said.stdout
    assert json.loads(said.stdout)["ok"]


def test_doctor_names_what_is_missing_and_how_to_get_it(tailrace: Run, home: Path, tmp_path: Path) -> None:
    (home / "kafka").unlink()
    said = tailrace("doctor", env={"PATH": str(tmp_path), "JAVA_HOME": ""})
    assert said.returncode == 1
    assert said.stdout.splitlines()[-1] == "missing: java, kafka jars, redis-server"
    for package in ("openjdk-17-jre-headless", "maven", "redis-server", "npm", "chromium chromium-driver"):
        assert f"apt-get install {package}" in said.stdout


def test_doctor_refuses_an_old_java(tailrace: Run, tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text("""#!/bin/sh\necho 'openjdk version "11.0.2" 2019-01-15' >&2\n""")
    java.chmod(0o755)
    said = tailrace("doctor", "--json", env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    check = next(check for check in json.loads(said.stdout)["checks"] if check["name"] == "java")
    assert (said.returncode, check["ok"], check["found"]) == (1, False, "11.0.2")


def test_addresses_come_from_the_environment_then_the_state_file_then_the_defaults(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert endpoints() == Endpoints("localhost:9092", "redis://localhost:6379/0")
    (home / "local").mkdir()
    state = {"bootstrap": "127.0.0.1:1", "redis_url": "redis://127.0.0.1:2/0"}
    (home / "local" / "state.json").write_text(json.dumps(state))
    assert endpoints() == Endpoints("127.0.0.1:1", "redis://127.0.0.1:2/0")
    monkeypatch.setenv("TAILRACE_BOOTSTRAP", "broker:9")
    assert endpoints() == Endpoints("broker:9", "redis://127.0.0.1:2/0")


def test_help_lists_every_command_and_imports_none() -> None:
    script = (
        "import sys; from infra.cli import main; main(['--help'], standalone_mode=False); "
        "print(*{'torch', 'kafka', 'faust', 'numpy', 'pydantic'} & set(sys.modules), file=sys.stderr)"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stderr.split() == []
    assert all(f"  {name} " in said.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "infra.cli", name, "--help"], capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr
    assert name == "down" or f"tailrace {name}" in said.stdout


def test_a_command_that_does_not_exist_is_refused(tailrace: Run) -> None:
    assert tailrace("upp").returncode == 2


def test_a_broker_that_is_not_there_is_a_sentence() -> None:
    script = (
        "import click, infra.cli as cli\n"
        "@click.command('status')\n"
        "def broken():\n    raise ConnectionError('no broker at x:1')\n"
        "cli.COMMANDS['status'] = ('__main__', '')\n"
        "cli.main(['status'])"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stderr) == (1, "Error: no broker at x:1\n")


def test_install_names_the_package_where_it_may_not_install_it(tmp_path: Path) -> None:
    """As an ordinary user without sudo and without Java."""
    for name, body in {"id": "echo 1000", "sudo": "exit 1", "apt-get": "exit 9"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    for name in ("bash", "dirname"):
        program = shutil.which(name)
        assert program
        (tmp_path / name).symlink_to(program)
    script = Path(__file__).resolve().parents[2] / "infra" / "install.sh"
    said = subprocess.run(
        [str(tmp_path / "bash"), str(script)],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 1
    assert "sudo apt-get install openjdk-17-jre-headless" in said.stderr
    assert "docker compose up" in said.stderr
