"""A virtual environment per rival, made when it is first asked for, under `.tailrace/rivals/NAME`."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from compression.home import home

_INSTALL_TIMEOUT_S: Final = 900


class CannotInstall(RuntimeError):
    """A rival that cannot be had here; the message says why."""


def ensure(name: str, requirements: Sequence[str]) -> Path:
    """Its interpreter: ours, with exactly these requirements; minutes the first time.

    Raises `CannotInstall`.
    """
    folder = home() / "rivals" / name
    python = folder / "bin" / "python"
    wanted = hashlib.sha256("\n".join(requirements).encode()).hexdigest()
    made = folder / "installed"
    if made.is_file() and made.read_text() == wanted and python.exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _run(name, [sys.executable, "-m", "venv", str(folder)])
    _run(name, [str(python), "-m", "pip", "install", "--quiet", *requirements])
    made.write_text(wanted)
    return python


def _run(name: str, command: Sequence[str]) -> None:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_INSTALL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise CannotInstall(f"{name}: {command[0]} took more than {_INSTALL_TIMEOUT_S} s") from None
    if ran.returncode:
        said = [line for line in (ran.stderr + ran.stdout).splitlines() if line.strip()]
        raise CannotInstall(f"{name} cannot be installed: {said[-1] if said else 'pip says nothing'}")
