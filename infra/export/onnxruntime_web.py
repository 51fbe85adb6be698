"""ONNX Runtime for browsers: the two files of its npm package that a bundle needs.

npm brings the package once, by exact version; the archive is kept under `.tailrace/edge` and compared with
the digest below whenever it is read.
"""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from compression.home import home

PACKAGE: Final = "onnxruntime-web"
VERSION: Final = "1.30.0"
INTEGRITY: Final = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# The kind that computes on the CPU only: half the size of those that may use a GPU.
LOADER: Final = "ort.wasm.bundle.min.mjs"
WASM: Final = "ort-wasm-simd-threaded.wasm"

_TIMEOUT_S: Final = 300
_MAX_FILE_BYTES: Final = 64 * 2**20


class RuntimeMissing(RuntimeError):
    """The browser's runtime cannot be had here; the message says why."""


def runtime_files() -> dict[str, bytes]:
    """Loader and WebAssembly by file name. The first time npm fetches 30 MB; later nothing is fetched."""
    archive = home() / "edge" / f"{PACKAGE}-{VERSION}.tgz"
    if not archive.is_file():
        _fetch(archive)
    content = archive.read_bytes()
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != INTEGRITY:
        raise RuntimeMissing(f"{archive} is not {PACKAGE} {VERSION}: remove it, and it is fetched again")
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as files:
        for name in (LOADER, WASM):
            member = files.extractfile(f"package/dist/{name}")
            if member is None:
                raise RuntimeMissing(f"{PACKAGE} {VERSION} holds no plain file {name}")
            found[name] = member.read(_MAX_FILE_BYTES)
    return found


def _fetch(archive: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeMissing(
            f"npm is missing, which brings {PACKAGE} {VERSION}: apt-get install npm, or put "
            f"`npm pack {PACKAGE}@{VERSION}` of another machine at {archive}"
        )
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".fetching-") as folder:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", folder]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise RuntimeMissing(f"npm did not bring {PACKAGE} {VERSION} in {_TIMEOUT_S} s") from None
        brought = Path(folder) / archive.name
        if ran.returncode or not brought.is_file():
            said = [line for line in (ran.stdout + ran.stderr).splitlines() if line.strip()]
            raise RuntimeMissing(f"npm cannot bring {PACKAGE} {VERSION}: {said[-1] if said else 'no reason'}")
        brought.replace(archive)
