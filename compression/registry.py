"""Released models: a folder per version, a manifest with checksums, aliases replaced last.

    versions/<version>/manifest.json and the files it names
    aliases/<alias>.json               {"version", "manifest_sha256"}

A reader never sees half a version: it is written elsewhere and renamed. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from features.encoding import Vocabulary, VocabularyInvalid

SERVING: Final = "serving"
MAX_FILES: Final = 64
MAX_FILE_BYTES: Final = 4 * 2**30
MAX_MANIFEST_BYTES: Final = 4 * 2**20
MANIFEST: Final = "manifest.json"
VOCABULARY: Final = "vocabulary.npz"
ITEM_TABLE: Final = "item_table.npy"

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ArtefactInvalid(ValueError):
    """A version that must not serve: missing, altered, cut short, or not what its manifest says."""


class FileEntry(BaseModel):
    """What a file of a version must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]


class ModelShape(BaseModel):
    """Everything needed to build the network again before its weights are loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dim: Annotated[int, Field(ge=2, le=4096)] = 64
    layers: Annotated[int, Field(ge=1, le=64)] = 2
    heads: Annotated[int, Field(ge=1, le=64)] = 1
    ffn: Annotated[int, Field(ge=1, le=65536)] = 128
    max_history: Annotated[int, Field(ge=1, le=4096)] = 100
    item_rows: Annotated[int, Field(ge=2)]
    category_rows: Annotated[int, Field(ge=2)]


class Manifest(BaseModel):
    """What a version is, where it came from and how good it was."""

    model_config = ConfigDict(frozen=True)

    schema_version: Annotated[Literal[1], Field(alias="schema")] = 1
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    created_at: str
    parent: str | None = None
    model: ModelShape
    # append is optional: without it a click is encoded with its whole history.
    graphs: dict[Literal["encode", "score", "rank", "append"], str]
    files: dict[str, FileEntry] = {}
    metrics: dict[str, Any] = {}
    data: dict[str, Any] = {}
    git_revision: str | None = None
    libraries: dict[str, str] = {}

    def to_bytes(self) -> bytes:
        return self.model_dump_json(indent=1, by_alias=True).encode()


class Artefact:
    """One version, opened. Bytes are checked each time they are read: what is returned is what the
    manifest promised, whatever happens to the folder meanwhile."""

    def __init__(self, path: Path, manifest: Manifest, manifest_sha256: str) -> None:
        self.path = path
        self.manifest = manifest
        self.manifest_sha256 = manifest_sha256

    @property
    def version(self) -> str:
        return self.manifest.version

    def read(self, name: str) -> bytes:
        """The verified bytes of a file, or `ArtefactInvalid`."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise ArtefactInvalid(f"{self.version}: the manifest names no file {name!r}")
        data = _read_plain(self.path / name, entry.bytes, self.version)
        if len(data) != entry.bytes:
            raise ArtefactInvalid(f"{self.version}: {name} has {len(data)} bytes, not {entry.bytes}")
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ArtefactInvalid(f"{self.version}: {name} is not the file that was published")
        return data

    def vocabulary(self) -> Vocabulary:
        try:
            vocabulary = Vocabulary.load(self.read(VOCABULARY))
        except VocabularyInvalid as error:
            raise ArtefactInvalid(f"{self.version}: {VOCABULARY}: {error}") from None
        shape = self.manifest.model
        if (vocabulary.item_rows, vocabulary.category_rows) != (shape.item_rows, shape.category_rows):
            raise ArtefactInvalid(f"{self.version}: the vocabulary and the model differ in rows")
        return vocabulary

    def item_table(self) -> npt.NDArray[np.float32]:
        """float32 [item_rows, dim]: the retrieval score of an item is its row times the user vector."""
        try:
            table = np.load(BytesIO(self.read(ITEM_TABLE)), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ArtefactInvalid(f"{self.version}: {ITEM_TABLE}: {error}") from None
        shape = (self.manifest.model.item_rows, self.manifest.model.dim)
        if table.dtype != np.float32 or table.shape != shape:
            raise ArtefactInvalid(f"{self.version}: {ITEM_TABLE} is {table.dtype}{list(table.shape)}")
        if not np.isfinite(table).all():
            raise ArtefactInvalid(f"{self.version}: {ITEM_TABLE} holds numbers that are not finite")
        return np.asarray(table, np.float32)


class Registry:
    """A folder of versions and aliases."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def publish(self, staging: Path, manifest: Manifest) -> Manifest:
        """Copy every file of `staging` in as `manifest.version`; all of it appears at once or not at all."""
        target = self._version_path(manifest.version)
        if target.exists():
            raise ArtefactInvalid(f"{manifest.version} is already published")
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".publishing-", dir=target.parent))
        try:
            files: dict[str, FileEntry] = {}
            for source in sorted(staging.iterdir()):
                _check_file_name(source.name, manifest.version)
                if source.is_symlink() or not source.is_file():
                    raise ArtefactInvalid(f"{manifest.version}: {source.name} is not a plain file")
                shutil.copyfile(source, work / source.name)
                files[source.name] = _entry(work / source.name)
            complete = manifest.model_copy(update={"files": files})
            _check_complete(complete)
            (work / MANIFEST).write_bytes(complete.to_bytes())
            for path in work.iterdir():
                _fsync(path)
            _fsync(work)
            work.chmod(0o755)
            work.rename(target)
            _fsync(target.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return complete

    def versions(self) -> list[str]:
        """Published versions, oldest name first."""
        folder = self.root / "versions"
        if not folder.is_dir():
            return []
        return sorted(p.name for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir())

    def manifest(self, version: str) -> Manifest:
        return self._read_manifest(version)[0]

    def resolve(self, alias_or_version: str) -> str:
        """The version an alias stands for; a version stands for itself."""
        return self._resolve(alias_or_version)[0]

    def manifest_sha256(self, version: str) -> str:
        """The checksum that an announcement of the version carries."""
        return self._read_manifest(version)[1]

    def promote(self, version: str, alias: str = SERVING) -> None:
        """Make the alias stand for a version, in one atomic step."""
        _check_name(alias)
        digest = self._read_manifest(version)[1]
        folder = self.root / "aliases"
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".promoting-", dir=folder)
        work = Path(name)
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump({"version": version, "manifest_sha256": digest}, file)
                file.flush()
                os.fsync(file.fileno())
            work.chmod(0o644)
            work.replace(folder / f"{alias}.json")
            _fsync(folder)
        finally:
            work.unlink(missing_ok=True)

    def open(self, alias_or_version: str = SERVING) -> Artefact:
        """A version whose every file has been verified, or `ArtefactInvalid` with the reason."""
        version, promised = self._resolve(alias_or_version)
        manifest, digest = self._read_manifest(version)
        if promised is not None and promised != digest:
            raise ArtefactInvalid(f"{version}: the manifest is not the one that was promoted")
        _check_complete(manifest)
        artefact = Artefact(self._version_path(version), manifest, digest)
        for name in manifest.files:
            artefact.read(name)
        return artefact

    def _resolve(self, alias_or_version: str) -> tuple[str, str | None]:
        _check_name(alias_or_version)
        alias = self.root / "aliases" / f"{alias_or_version}.json"
        if not alias.is_file():
            if not self._version_path(alias_or_version).is_dir():
                raise ArtefactInvalid(
                    f"no version or alias {alias_or_version!r} in {self.root}; "
                    "`tailrace retrain --log FILE` publishes one"
                )
            return alias_or_version, None
        try:
            entry = json.loads(_read_plain(alias, MAX_MANIFEST_BYTES, alias_or_version))
            version, digest = entry["version"], entry["manifest_sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise ArtefactInvalid(f"alias {alias_or_version!r} cannot be read: {error}") from None
        if not isinstance(version, str) or not isinstance(digest, str):
            raise ArtefactInvalid(f"alias {alias_or_version!r} does not name a version")
        _check_name(version)
        return version, digest

    def _read_manifest(self, version: str) -> tuple[Manifest, str]:
        data = _read_plain(self._version_path(version) / MANIFEST, MAX_MANIFEST_BYTES, version)
        try:
            manifest = Manifest.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            raise ArtefactInvalid(f"{version}: manifest: {field}: {first['msg']}") from None
        if manifest.version != version:
            raise ArtefactInvalid(f"{version}: the manifest is of version {manifest.version}")
        return manifest, hashlib.sha256(data).hexdigest()

    def _version_path(self, version: str) -> Path:
        _check_name(version)
        return self.root / "versions" / version


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ArtefactInvalid(f"{name!r} is not a version or alias: letters, digits, . _ - only")


def _check_file_name(name: str, version: str) -> None:
    if not _NAME.fullmatch(name) or name == MANIFEST:
        raise ArtefactInvalid(f"{version}: {name!r} is not a plain file name")


def _check_complete(manifest: Manifest) -> None:
    if len(manifest.files) > MAX_FILES:
        raise ArtefactInvalid(f"{manifest.version}: more than {MAX_FILES} files")
    for name in manifest.files:
        _check_file_name(name, manifest.version)
    for name in (*manifest.graphs.values(), VOCABULARY, ITEM_TABLE):
        if name not in manifest.files:
            raise ArtefactInvalid(f"{manifest.version}: {name} is missing")
    missing = {"encode", "score", "rank"} - set(manifest.graphs)
    if missing:
        raise ArtefactInvalid(f"{manifest.version}: no graph named {', '.join(sorted(missing))}")


def _read_plain(path: Path, limit: int, version: str) -> bytes:
    """At most `limit` + 1 bytes of a regular file: a link or a device is refused, not followed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ArtefactInvalid(f"{version}: {path.name} cannot be read: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ArtefactInvalid(f"{version}: {path.name} is not a plain file")
        return file.read(limit + 1)


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(sha256=digest, bytes=path.stat().st_size)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
