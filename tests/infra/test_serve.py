"""`tailrace serve` as a process: ready when warmed, drained on SIGTERM, a sentence where it cannot start."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from aiohttp import ClientError, ClientSession
from click.testing import CliRunner
from grpc import ssl_channel_credentials as trust

from inference.errors import Overloaded
from inference.oip.client import Client
from infra.cli import main
from infra.local.server import free_port, free_ports
from tests.inference.oip.test_tls import Authority

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["--grpc-port", "0", "--http-port", "0", "--admin-port", "0", "--engine", "onnx"]
SMALL = {"INFERENCE_BATCHES": "[1, 4]", "INFERENCE_HISTORIES": "[10, 100]", "INFERENCE_RUNNERS": "1"}


def serve(registry: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "infra.cli", "serve", "--registry", str(registry), *WORDS, *words],
        cwd=ROOT,
        env={**os.environ, **SMALL, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def server(registry: Path) -> Iterator[subprocess.Popen[str]]:
    process = serve(registry)
    yield process
    process.kill()
    process.communicate()


def test_a_server_says_where_it_is_and_how_long_it_took_and_drains(server: subprocess.Popen[str]) -> None:
    assert server.stdout is not None
    line = server.stdout.readline()
    found = re.match(r"serving (\S+) on gRPC (\S+), HTTP (\S+), admin (\S+); cold start ([\d.]+) s\n", line)
    assert found, line + (server.stderr.read() if server.stderr else "")
    version, grpc_address, _, _, cold_s = found.groups()
    assert 0 < float(cold_s) < 60

    async def ask() -> int:
        async with Client(grpc_address) as client:
            assert await client.ready()
            row = np.array([[1, 2, 3]])
            inputs = dict.fromkeys(("items", "categories", "timestamps"), row)
            inputs |= {"behaviors": np.zeros((1, 3), np.int32), "lengths": np.array([3], np.int32)}
            answer = await client.infer("tailrace-lists", inputs, version=version)
            return int(answer["counts"][0])

    assert asyncio.run(ask()) == 10
    server.send_signal(signal.SIGTERM)
    said, errors = server.communicate(timeout=20)
    assert server.returncode == 0, errors
    assert said == "draining 0 requests\nall were answered\n"
    assert "Traceback" not in errors


def test_tiers_are_looked_up_in_redis_and_limit_who_they_should(registry: Path, redis_url: str) -> None:
    done = CliRunner().invoke(main, ["tiers", "set", "7", "premium", "--redis-url", redis_url])
    assert done.exit_code == 0, done.output
    tiers = '[{"name":"standard","client_rate":0.01,"client_burst":2},{"name":"premium"}]'
    process = serve(registry, "--redis-url", redis_url, ADMISSION_TIERS=tiers)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split("gRPC ")[1].split(",")[0]

        async def ask(user: int) -> list[float | None]:
            row = np.array([[1, 2, 3]])
            inputs = dict.fromkeys(("items", "categories", "timestamps"), row)
            inputs |= {"behaviors": np.zeros((1, 3), np.int32), "lengths": np.array([3], np.int32)}
            refused: list[float | None] = []
            async with Client(address) as client:
                for _ in range(6):
                    try:
                        await client.infer("tailrace-lists", inputs | {"user_ids": np.array([user])})
                    except Overloaded as error:
                        refused.append(error.retry_after_s)
            return refused

        assert asyncio.run(ask(7)) == []
        assert asyncio.run(ask(8)) == [100.0] * 4
    finally:
        process.kill()
        process.communicate()


def test_ctrl_c_while_it_warms_ends_it(server: subprocess.Popen[str]) -> None:
    server.send_signal(signal.SIGINT)
    server.communicate(timeout=30)
    assert server.returncode is not None


@pytest.mark.parametrize(
    ("words", "environment", "sentence"),
    [
        (["--version", "nothing"], {}, "no version or alias 'nothing'"),
        (["--admin-host", "0.0.0.0"], {}, "TAILRACE_ADMIN_TOKEN"),
        (["--engine", "abacus"], {}, "no engine is called 'abacus'"),
        ([], {"SERVE_MAX_REQUESTS": "0"}, "SERVE_MAX_REQUESTS should be greater than or equal to 1, not '0'"),
        ([], {"SERVE_TLS_CERTIFICATE": "/no/such.pem"}, "SERVE_TLS_KEY is not set"),
        ([], {"SERVE_TLS_CERTIFICATE": "/no/such.pem", "SERVE_TLS_KEY": "/no/key"}, "/no/such.pem cannot"),
        ([], {"ADMISSION_DEFAULT_TIER": "gold"}, "'gold' is none of free"),
    ],
)
def test_what_is_wrong_at_the_start_is_a_sentence(
    registry: Path, words: list[str], environment: dict[str, str], sentence: str
) -> None:
    process = serve(registry, *words, **environment)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert sentence in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("port", ["--grpc-port", "--http-port", "--admin-port"])
def test_a_taken_port_is_a_sentence(registry: Path, port: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = str(listener.getsockname()[1])
        process = serve(registry, port, taken)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert taken in errors
    assert "Traceback" not in errors


def test_several_processes_share_the_ports_and_drain_together(registry: Path) -> None:
    grpc_port = free_port()
    http_port = free_port(grpc_port)
    admin_port = free_ports(2, grpc_port, http_port)
    words = ["--grpc-port", grpc_port, "--http-port", http_port, "--admin-port", admin_port]
    process = serve(registry, "--workers", "2", *map(str, words))
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        assert all(f"gRPC 127.0.0.1:{grpc_port}" in line for line in lines), lines
        assert {line.split("admin ")[1].split(";")[0] for line in lines} == {
            f"127.0.0.1:{admin_port}",
            f"127.0.0.1:{admin_port + 1}",
        }

        async def ask() -> bool:
            async with Client(f"127.0.0.1:{grpc_port}") as client:
                return await client.ready()

        assert all(asyncio.run(ask()) for _ in range(8))
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
        assert said.count("all were answered") == 2
    finally:
        process.terminate()
        process.communicate()


def test_several_processes_speak_tls_on_both_fronts(registry: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    certificate, key = authority.issue("server")
    trusted = ssl.create_default_context(cafile=str(authority.file))
    grpc_port = free_port()
    http_port = free_port(grpc_port)
    ports = ["--grpc-port", grpc_port, "--http-port", http_port]
    ports += ["--admin-port", free_ports(2, grpc_port, http_port)]
    secured = {"SERVE_TLS_CERTIFICATE": str(certificate), "SERVE_TLS_KEY": str(key)}
    process = serve(registry, "--workers", "2", *map(str, ports), **secured)

    async def ask() -> None:
        address, credentials = f"127.0.0.1:{grpc_port}", trust(authority.file.read_bytes())
        async with Client(address, credentials=credentials) as client, ClientSession() as session:
            assert await client.ready()
            url = f"https://127.0.0.1:{http_port}/v2/health/ready"
            async with session.get(url, ssl=trusted) as answer:
                assert answer.status == 200
            # Who does not speak it is not served, and in nobody's way.
            with pytest.raises(ClientError):
                await session.get(url.replace("https", "http"))
            assert await client.ready()

    try:
        assert process.stdout is not None
        assert all("serving" in process.stdout.readline() for _ in range(2))
        asyncio.run(ask())
    finally:
        process.terminate()
        process.communicate()


def test_several_processes_need_ports_that_are_named_and_free(registry: Path) -> None:
    process = serve(registry, "--workers", "2")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ports of their own" in errors
