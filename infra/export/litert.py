"""The rank graph as a LiteRT model (.tflite) for phones: one user, a full-length history, 50 candidates.

The converter pins libraries that are not ours, so it lives in a venv of its own, under `.tailrace/litert`,
which borrows torch from here. It is handed verified weights and inputs, and hands back the model and what
the LiteRT interpreter makes of those inputs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np

from compression.home import CHECKOUT, home
from compression.releases.registry import Artefact
from inference.engines.base import TOLERANCE, WEIGHTS
from inference.engines.model_file import read_graph
from inference.types import Tensors
from infra.export.folder import (
    ExportFailed,
    ExportManifest,
    GraphEntry,
    check_free,
    write_export,
)
from infra.export.parity import rank_inputs, reference

PACKAGES: Final = ("litert-torch==0.10.0", "ai-edge-litert==2.3.0", "litert-converter==0.5.0", "jax==0.10.2")
FILE: Final = "rank.tflite"

_HISTORY: Final = ("items", "categories", "behaviors", "gaps")
_INSTALL_TIMEOUT_S: Final = 900
_CONVERT_TIMEOUT_S: Final = 600


def export(artefact: Artefact, out: Path) -> ExportManifest:
    """Write the model. Raises `ExportFailed`, `ArtefactInvalid`, `ModelUnavailable`. Takes half a minute, and
    as long again the first time, when the converter is installed."""
    check_free(out)
    if artefact.manifest.kind != "ranking":
        raise ExportFailed(f"{artefact.version} is a retrieval model: LiteRT is written from ranking ones")
    published = reference(read_graph(artefact, "rank"))
    longest = artefact.manifest.model.max_history
    asked: dict[str, Any] = _asked(artefact, longest)
    with tempfile.TemporaryDirectory(prefix="tailrace-litert-") as name:
        folder = Path(name)
        (folder / WEIGHTS).write_bytes(artefact.read(WEIGHTS))
        (folder / "model.json").write_text(artefact.manifest.model.model_dump_json())
        np.savez(folder / "inputs.npz", allow_pickle=False, **asked)
        _convert(folder)
        content = (folder / FILE).read_bytes()
        scores = np.load(folder / "scores.npy", allow_pickle=False)
    difference = float(np.abs(scores - published(asked)["scores"]).max())
    if not difference <= TOLERANCE["f32"]:
        raise ExportFailed(f"LiteRT's answers differ by {difference:.1e} from the published graph's")
    contents = {FILE: content}
    return write_export(
        "litert",
        artefact,
        "f32",
        {"rank": GraphEntry(files=(FILE,), max_difference=difference)},
        contents,
        out,
    )


def venv_dir() -> Path:
    """Where this version's venv is, or will be. The name changes with what is pinned."""
    return home() / "litert" / f"venv-{'-'.join(package.rpartition('==')[2] for package in PACKAGES)}"


def ensure_converter() -> Path:
    """The interpreter that can convert. Raises `ExportFailed` with what is missing."""
    target = venv_dir()
    python = target / "bin" / "python"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="making-") as making:
            venv = Path(making) / "venv"
            _run(
                [sys.executable, "-m", "venv", str(venv)],
                "a venv for LiteRT cannot be made",
                _INSTALL_TIMEOUT_S,
            )
            # Torch and what it needs are ours: several gigabytes that need not be there twice.
            packages = next(venv.glob("lib/python3.*/site-packages"))
            (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
            pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "-q", "--no-compile"]
            _run([*pip, *PACKAGES], "pip could not install LiteRT's converter", _INSTALL_TIMEOUT_S)
            try:
                venv.rename(target)
            except OSError:
                # Somebody else made one meanwhile: theirs is as good.
                if not target.is_dir():
                    raise
    return python


def _asked(artefact: Artefact, longest: int) -> Tensors:
    """Users by the row, all of them with slots for the longest history."""
    parts = list(rank_inputs(artefact.vocabulary(), longest))
    for part in parts:
        for name in _HISTORY:
            part[name] = np.pad(part[name], ((0, 0), (0, longest - part[name].shape[1])))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _convert(folder: Path) -> None:
    script = Path(__file__).with_name("litert_convert.py")
    _run(
        [str(ensure_converter()), str(script), str(folder)], "LiteRT cannot convert this", _CONVERT_TIMEOUT_S
    )


def _run(command: list[str], what: str, timeout_s: float) -> None:
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout_s, env=environment
        )
    except subprocess.TimeoutExpired:
        raise ExportFailed(f"{what}: it took more than {timeout_s:.0f} s") from None
    if ran.returncode:
        raise ExportFailed(f"{what}:\n{(ran.stdout + ran.stderr)[-2000:]}")
