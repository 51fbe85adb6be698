"""A new folder of files with their checksums, written whole or not at all."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from compression.releases.registry import Artefact, FileEntry
from inference.types import Graph

MANIFEST: Final = "manifest.json"
Kind = Literal["openvino", "tensorrt", "litert"]


class ExportFailed(ValueError):
    """What was asked for cannot be exported; the message says why."""


class GraphEntry(BaseModel):
    """A graph's files, how far its answers are from the published graph's on ONNX Runtime, and the command
    that still has to be run where it will serve, if any."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: tuple[str, ...]
    max_difference: float
    build: str = ""


class ExportManifest(BaseModel):
    """What an exported folder holds. `numbers` is how weights, and perhaps activations, are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    version: str
    released_manifest_sha256: str
    numbers: str
    graphs: dict[Graph, GraphEntry]
    files: dict[str, FileEntry]

    def to_bytes(self) -> bytes:
        return self.model_dump_json(indent=1).encode()


def check_free(out: Path) -> None:
    """Refuse to write over what is there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportFailed(f"{out} is there already, and not empty: name another folder")


def write_folder(out: Path, contents: Mapping[str, bytes]) -> None:
    """All files, or no folder."""
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".exporting-") as name:
        work = Path(name) / "whole"
        work.mkdir(mode=0o755)
        for file, content in contents.items():
            (work / file).write_bytes(content)
        work.replace(out)


def write_export(
    kind: Kind,
    artefact: Artefact,
    numbers: str,
    graphs: dict[Graph, GraphEntry],
    contents: Mapping[str, bytes],
    out: Path,
) -> ExportManifest:
    """The folder of an exported version, with its manifest."""
    manifest = ExportManifest(
        kind=kind,
        version=artefact.version,
        released_manifest_sha256=artefact.manifest_sha256,
        numbers=numbers,
        graphs=graphs,
        files=entries(contents),
    )
    write_folder(out, {**contents, MANIFEST: manifest.to_bytes()})
    return manifest


def entries(contents: Mapping[str, bytes]) -> dict[str, FileEntry]:
    """Size and checksum of each file."""
    return {
        name: FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
        for name, content in contents.items()
    }
