"""What this machine has and lacks. Each check says what it found and how to get what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError

import psutil

from compression.home import home
from infra.local import browser, stack
from infra.local.kafka import jars_dir, kafka_version
from infra.local.server import is_free

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Check:
    """`needed` is False where something works without it; `remedy` is empty where `ok`."""

    name: str
    ok: bool
    needed: bool
    found: str
    remedy: str


def checks() -> list[Check]:
    """Everything, in the order a person would mend it."""
    return [
        _python(),
        *_libraries(),
        _java(),
        _jars(),
        _redis(),
        *(_port(name, port) for name, port in (("kafka", stack.KAFKA_PORT), ("redis", stack.REDIS_PORT))),
        _memory(),
        _disk(),
        _extra("torch", "train", "training and the reference engine"),
        _extra("onnxruntime", "onnx", "the ONNX Runtime engine"),
        _extra("openvino", "openvino", "the OpenVINO engine"),
        _containers(),
        _npm(),
        _browser(),
    ]


def _check(name: str, ok: bool, found: str, remedy: str, *, needed: bool = True) -> Check:
    return Check(name, ok, needed, found, "" if ok else remedy)


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return _check("python", (3, 11) <= sys.version_info[:2] < (3, 14), version, "install Python 3.11 to 3.13")


def _libraries() -> list[Check]:
    """The libraries the package itself depends on; one line where all are there."""
    absent = []
    for requirement in importlib.metadata.requires("tailrace") or []:
        if "extra ==" in requirement:
            continue
        name = re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0]
        try:
            importlib.metadata.version(name)
        except PackageNotFoundError:
            absent.append(name)
    found = f"missing: {', '.join(absent)}" if absent else "all installed"
    return [_check("libraries", not absent, found, "make install")]


def _java() -> Check:
    remedy = "apt-get install openjdk-17-jre-headless, or docker compose up"
    java = shutil.which("java")
    if java is None:
        return _check("java", False, "not found", remedy)
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "((\d+)[^"]*)"', said)
    if version is None:
        return _check("java", False, said.strip()[:60] or "does not answer", remedy)
    return _check("java", int(version[2]) >= 17, version[1], remedy)


def _jars() -> Check:
    if jars_dir().is_dir():
        return _check("kafka jars", True, kafka_version(), "")
    maven = shutil.which("mvn")
    found = f"{kafka_version()} not fetched yet; Maven is {'there' if maven else 'not found'}"
    # With Maven there, `tailrace up` fetches them by itself.
    return _check("kafka jars", maven is not None, found, "apt-get install maven, then make install")


def _redis() -> Check:
    program = shutil.which("redis-server")
    remedy = "apt-get install redis-server, or docker compose up"
    if program is None:
        return _check("redis-server", False, "not found", remedy)
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"v=(\S+)", said)
    return _check("redis-server", version is not None, version[1] if version else said[:60], remedy)


def _port(name: str, port: int) -> Check:
    ours = next(server for server in stack.status() if server.name == name)
    if ours.running:
        return _check(f"port {port}", True, f"{name} of this checkout runs at {ours.address}", "")
    remedy = f"none needed: `tailrace up` takes a free port for {name}"
    free = is_free(port)
    return _check(f"port {port}", free, "free" if free else "taken by another program", remedy, needed=False)


def _memory() -> Check:
    available_gib = psutil.virtual_memory().available / GIB
    return _check("memory", available_gib >= 1.5, f"{available_gib:.1f} GiB available", "free 1.5 GiB")


def _disk() -> Check:
    folder = next(path for path in (home(), *home().parents) if path.exists())
    free_gib = shutil.disk_usage(folder).free / GIB
    return _check("disk", free_gib >= 2, f"{free_gib:.1f} GiB free at {folder}", "free 2 GiB")


def _extra(library: str, extra: str, use: str) -> Check:
    there = importlib.util.find_spec(library) is not None
    found = importlib.metadata.version(library) if there else f"not installed; {use} needs it"
    return _check(library, there, found, f"pip install -c constraints.txt '.[{extra}]'", needed=False)


def _containers() -> Check:
    for name in ("docker", "podman"):
        program = shutil.which(name)
        if (
            program
            and subprocess.run([program, "info"], capture_output=True, text=True, check=False).returncode == 0
        ):
            return _check("containers", True, name, "")
    remedy = "make test-containers installs podman where it may; nothing else needs containers"
    return _check("containers", False, "neither a Docker engine nor podman answers", remedy, needed=False)


def _npm() -> Check:
    program = shutil.which("npm")
    return _check(
        "npm",
        program is not None,
        program or "not found; `tailrace export edge` needs it once",
        "apt-get install npm",
        needed=False,
    )


def _browser() -> Check:
    try:
        found, ok = browser.check_browser()[0], True
    except browser.BrowserMissing as error:
        found, ok = f"{error}".partition(":")[0] + "; `tailrace bench edge` needs it", False
    return _check("chromium", ok, found, browser.REMEDY, needed=False)
