"""Tables for people and JSON with everything that a figure depends on."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson
import psutil
from rich.table import Table

from infra.console import console

LIBRARIES = (
    "aiokafka",
    "faust-streaming",
    "kafka-python",
    "redis",
    "numpy",
    "onnxruntime",
    "openvino",
    "torch",
    "uvloop",
)
ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, Any]:
    """The machine, the versions and the revision that figures were taken with."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": psutil.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "system": f"{platform.system()} {platform.release()}",
        },
        "python": platform.python_version(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
        "git_revision": _revision(),
    }


def write(path: Path | None, name: str, body: dict[str, Any]) -> None:
    """The measurement as JSON, where a path is given; what was not measured (NaN) is null."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figures = {"bench": name, **environment(), **body}
        options = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY
        path.write_bytes(orjson.dumps(figures, option=options | orjson.OPT_APPEND_NEWLINE))


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on standard output; the first column to the left, figures to the right."""
    drawn = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        drawn.add_column(column, justify="left" if place == 0 else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    out = console()
    out.print(drawn)
    machine = environment()["machine"]
    out.print(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB", style="dim")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _revision() -> str | None:
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or None


def note(text: str) -> None:
    """A remark under a table."""
    console().print(text, style="yellow")
