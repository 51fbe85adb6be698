"""What is made of a version before a process opens it, kept between starts and shared by processes.

    <key>/record.json            what it was made from, and length and sha256 of every file; written last
    <key>/index                  the retrieval index
    <key>/<engine>-<options>/    what that engine's `prepare` wrote

A version is verified and what is kept is compared with its record each time anew: only the making is saved,
and looking at graphs, whose rules are part of what a folder was made from. Files are mapped by who serves, so
a folder is replaced and never changed, and only one that nobody else can write to is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from compression.releases.provenance import sha256_of
from compression.releases.registry import (
    Artefact,
    ArtefactInvalid,
    Registry,
)
from inference import engines
from inference.engines.base import EngineOptions, graphs_of
from inference.errors import ModelUnavailable
from inference.own_folder import own_folder, user_cache
from inference.retrieval import RetrievalIndex

RECORD: Final = "record.json"
INDEX: Final = "index"
# Of so many versions, the latest used, something is kept.
MOST_KEPT: Final = 8
# Whoever began to write a folder and has not ended by then was killed.
_WRITES_FOR_S: Final = 3_600.0
_MAKING: Final = ".making-"
_FORMAT: Final = 3  # of what is written
_LIBRARIES: Final = ("faiss-cpu", "onnx", "onnxruntime", "openvino", "numpy")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which version to prepare, and for which engines. `version` may be an alias."""

    registry: str
    version: str
    sha256: str | None
    engines: tuple[tuple[str, EngineOptions], ...]
    cached: bool
    exact_until: int
    probes: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Wanted:
        told = json.loads(text)
        told["engines"] = tuple((name, EngineOptions(**options)) for name, options in told["engines"])
        return cls(**told)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A verified version, named by its manifest's checksum, and where what was made of it lies."""

    version: str
    sha256: str
    folder: Path

    @property
    def index(self) -> Path:
        return self.folder / INDEX

    @classmethod
    def from_json(cls, text: str) -> Prepared:
        told = json.loads(text)
        return cls(told["version"], told["sha256"], Path(told["folder"]))

    def to_json(self) -> str:
        return json.dumps({"version": self.version, "sha256": self.sha256, "folder": str(self.folder)})

    def held(self) -> list[int]:
        """Open descriptors of its files, to be closed after what has mapped them was freed. A folder may be
        tidied away meanwhile; whoever lets go of a deleted file last waits for the file system, and a library
        that unmaps one does so under the interpreter's lock."""
        found: list[int] = []
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):
                found.append(os.open(path, os.O_RDONLY))
        return found

    def of_engine(self, name: str, options: EngineOptions) -> Path | None:
        """An engine's folder; None where it prepares nothing."""
        folder = self.folder / _engine_folder(name, options)
        return folder if folder.is_dir() else None


class _Remembering(Artefact):
    """Reads and verifies every file once: it is gone before the version is used."""

    def __init__(self, opened: Artefact) -> None:
        super().__init__(opened.path, opened.manifest, opened.manifest_sha256)
        self._known: dict[str, bytes] = {}
        self._verified: set[str] = set()

    def check(self, name: str) -> None:
        if name not in self._verified:
            super().check(name)

    def read(self, name: str) -> bytes:
        data = self._known.get(name)
        if data is None:
            data = self._known[name] = super().read(name)
            self._verified.add(name)
        return data


def prepare(wanted: Wanted, cache: Path | None = None) -> Prepared:
    """Verify a version's signature and every file, look at its graphs, and see that what engines load of it
    is there. Takes a second or two. Raises `ModelUnavailable` with the reason."""
    root = own_folder(cache or user_cache() / "prepared")
    try:
        opened = Registry(wanted.registry).open(wanted.version, sha256=wanted.sha256, check_files=False)
        made_from = _made_from(opened, wanted)
        name = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        folder = root / name
        if _is_whole(folder, made_from):
            opened.read_all()
        else:
            _make(folder, _Remembering(opened), wanted, made_from)
    except ArtefactInvalid as error:
        raise ModelUnavailable(str(error)) from error
    except OSError as error:
        raise ModelUnavailable(f"nothing can be prepared in {root}: {error.strerror}") from error
    os.utime(folder)
    _forget_old(root)
    return Prepared(opened.version, opened.manifest_sha256, folder)


def _make(folder: Path, artefact: Artefact, wanted: Wanted, made_from: Mapping[str, Any]) -> None:
    """Written beside and renamed: a reader sees all of it or nothing."""
    work = Path(tempfile.mkdtemp(prefix=_MAKING, dir=folder.parent))
    try:
        _check_graphs(artefact, wanted)
        vocabulary, table = artefact.vocabulary(), artefact.item_table()
        known = len(vocabulary.item_ids)
        RetrievalIndex.build(
            vocabulary.item_ids, table[1 : 1 + known], exact_until=wanted.exact_until, probes=wanted.probes
        ).save(work / INDEX)
        for name, options in _preparing(wanted):
            engine = engines.create(name, options)
            own = work / _engine_folder(name, options)
            own.mkdir()
            engine.prepare(artefact, graphs_of(engine, cached=wanted.cached, artefact=artefact), own)
            engine.close()
        artefact.read_all()  # what was not read above
        files = {str(path.relative_to(work)): _entry(path) for path in _files(work)}
        (work / RECORD).write_text(json.dumps({"made_from": made_from, "files": files}, indent=1))
        if not _is_whole(folder, made_from):  # another process was faster
            shutil.rmtree(folder, ignore_errors=True)
            try:
                work.rename(folder)
            except OSError:  # within this moment, and so that the folder is not empty
                if not _is_whole(folder, made_from):
                    raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_graphs(artefact: Artefact, wanted: Wanted) -> None:
    """Also those of engines that look at none while they prepare."""
    from inference.engines.model_file import read_graph

    for name, options in _preparing(wanted):
        engine = engines.create(name, options)
        for graph in graphs_of(engine, cached=wanted.cached, artefact=artefact):
            read_graph(artefact, graph)
        engine.close()


def _preparing(wanted: Wanted) -> Sequence[tuple[str, EngineOptions]]:
    return [(name, options) for name, options in wanted.engines if engines.prepares(name, options)]


def _made_from(artefact: Artefact, wanted: Wanted) -> dict[str, Any]:
    """Everything that what is made depends on."""
    told: dict[str, Any] = json.loads(
        json.dumps(
            {
                "format": _FORMAT,
                "files": {name: entry.sha256 for name, entry in sorted(artefact.manifest.files.items())},
                "graphs": dict(artefact.manifest.graphs),
                "engines": [(name, asdict(options)) for name, options in _preparing(wanted)],
                "cached": wanted.cached,
                "exact_until": wanted.exact_until,
                "rules": _rules(),
                "libraries": {name: _version(name) for name in _LIBRARIES},
                "processor": _processor(),
            }
        )
    )
    return told


def _is_whole(folder: Path, made_from: Mapping[str, Any]) -> bool:
    """Whether a folder holds exactly what its record says, and was made from this."""
    try:
        record = json.loads((folder / RECORD).read_text())
        found = {str(path.relative_to(folder)): _entry(path) for path in _files(folder)}
        return (record["made_from"], record["files"]) == (made_from, found)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _files(folder: Path) -> list[Path]:
    """Plain files below a folder, its record apart. Links are none of ours: they spoil the comparison."""
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link")
    found = [path for path in sorted(folder.rglob("*")) if not path.is_dir() or path.is_symlink()]
    if any(path.is_symlink() or not path.is_file() for path in found):
        raise ValueError(f"{folder} holds what is no plain file")
    return [path for path in found if path != folder / RECORD]


def _entry(path: Path) -> list[Any]:
    return [path.stat().st_size, sha256_of(path)]


def _forget_old(root: Path) -> None:
    """Who has mapped the files of a folder keeps them."""
    for path in root.glob(f"{_MAKING}*"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if path.stat().st_mtime < time.time() - _WRITES_FOR_S:
                shutil.rmtree(path, ignore_errors=True)
    kept = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for path in sorted(kept, key=lambda path: path.stat().st_mtime, reverse=True)[MOST_KEPT:]:
        shutil.rmtree(path, ignore_errors=True)


def _engine_folder(name: str, options: EngineOptions) -> str:
    told = json.dumps(asdict(options), sort_keys=True).encode()
    return f"{name}-{hashlib.sha256(told).hexdigest()[:12]}"


def _rules() -> str:
    """What is refused of a graph: with other rules, what is kept was made under none of them."""
    return hashlib.sha256(Path(engines.__file__).with_name("model_file.py").read_bytes()).hexdigest()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    """Libraries choose kernels, and so layouts, by what the processor has."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
        return hashlib.sha256("\n".join(told).encode()).hexdigest()
    return f"{platform.machine()} {platform.processor()}"
