"""Released models: a folder per version, a manifest with checksums, aliases replaced last.

    versions/<version>/manifest.json, manifest.sig and the files the manifest names
    aliases/<alias>.json               `compression.releases.aliases`

A reader never sees half a version: it is written elsewhere and renamed. Nothing is unpickled. Every
version that is opened has been checked against its signature (`compression.releases.signing`) and checksums.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compression.errors import ArtefactInvalid, ReleaseRefused, first_fault
from compression.files import fsync, hash_plain, read_plain, write_whole
from compression.releases.aliases import Aliases, AliasState, Release, check_name, is_name
from compression.releases.provenance import sha256_of
from compression.releases.signing import MAX_SIGNATURE_BYTES, SIGNATURE, Signer, Trust
from features.encoding import Vocabulary, VocabularyInvalid
from features.fusion import Fusion
from features.npy import read_npy

__all__ = [
    "ITEM_TABLE",
    "SERVING",
    "VOCABULARY",
    "Artefact",
    "ArtefactInvalid",
    "FileEntry",
    "Manifest",
    "ModelShape",
    "Registry",
    "read_item_table",
    "write_item_table",
]

SERVING: Final = "serving"
MAX_FILES: Final = 64
MAX_FILE_BYTES: Final = 4 * 2**30
MAX_MANIFEST_BYTES: Final = 4 * 2**20
MANIFEST: Final = "manifest.json"
VOCABULARY: Final = "vocabulary.npz"
ITEM_TABLE: Final = "item_table.npy"


Kind = Literal["ranking", "retrieval"]


class FileEntry(BaseModel):
    """What a file of a version must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]


@cache
def states_by_layer(layers: int, *kinds: str) -> tuple[str, ...]:
    """Names of states; asked for at every run of an engine."""
    return tuple(f"{kind}_{layer}" for layer in range(layers) for kind in kinds)


@cache
def of_new_event(state_names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the states of one appended event."""
    return tuple(f"new_{name}" for name in state_names)


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
    states: bool = True
    """Whether of a history more is kept than its user vector: what attention reads of each event."""
    vector_scores: bool = False
    """Whether candidates are scored by the user vector alone, though a history has states that events are
    appended to."""

    @property
    def scores_by_vector(self) -> bool:
        """Whether a candidate's score is its row times the user vector."""
        return self.vector_scores or not self.states

    @property
    def state_names(self) -> tuple[str, ...]:
        """The tensors [users, events, dim] that are kept of a history, in order. Where candidates ask, too,
        keys and values by layer; else what both are made of, so that half as much is kept and read."""
        if not self.states:
            return ()
        kinds = ("state",) if self.vector_scores else ("key", "value")
        return states_by_layer(self.layers, *kinds)

    @property
    def new_state_names(self) -> tuple[str, ...]:
        """The same of one appended event, [users, 1, dim]."""
        return of_new_event(self.state_names)


class Manifest(BaseModel):
    """What a version is, where it came from and how good it was."""

    model_config = ConfigDict(frozen=True)

    schema_version: Annotated[Literal[1], Field(alias="schema")] = 1
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    created_at: str
    parent: str | None = None
    # Which network it is: one that reads candidates beside the history, or one whose user vector scores the
    # whole catalogue. What is served has graphs, of either kind; without, a version is evaluated only.
    kind: Kind = "ranking"
    model: ModelShape
    # append is optional: without it a click is encoded with its whole history. It needs a model with states.
    graphs: dict[Literal["encode", "score", "rank", "append"], str] = {}
    files: dict[str, FileEntry] = {}
    # What online counts add to the network's scores; without it nothing.
    fusion: Fusion | None = None
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
        self.checked: set[str] = set()
        """Graphs whose content has been looked at: `read` says that their bytes are still the same."""

    @property
    def version(self) -> str:
        return self.manifest.version

    def read(self, name: str) -> bytes:
        """The verified bytes of a file, or `ArtefactInvalid`."""
        entry = self._entry(name)
        data = read_plain(self.path / name, entry.bytes, self.version)
        self._compare(name, entry, _sha256(data), len(data))
        return data

    def check(self, name: str) -> None:
        """The same verdict as `read`, a piece of the file at a time: nothing as large as it is written."""
        entry = self._entry(name)
        digest, size = hash_plain(self.path / name, entry.bytes, self.version)
        self._compare(name, entry, digest, size)

    def read_all(self) -> None:
        """Check every file."""
        for name in self.manifest.files:
            self.check(name)

    def _entry(self, name: str) -> FileEntry:
        entry = self.manifest.files.get(name)
        if entry is None:
            raise ArtefactInvalid(f"{self.version}: the manifest names no file {name!r}")
        return entry

    def _compare(self, name: str, entry: FileEntry, digest: str, size: int) -> None:
        if size != entry.bytes:
            raise ArtefactInvalid(f"{self.version}: {name} has {size} bytes, not {entry.bytes}")
        if digest != entry.sha256:
            raise ArtefactInvalid(f"{self.version}: {name} is not the file that was published")

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
            table = read_item_table(self.read(ITEM_TABLE))
        except (ValueError, EOFError) as error:
            raise ArtefactInvalid(f"{self.version}: {ITEM_TABLE}: {error}") from None
        shape = (self.manifest.model.item_rows, self.manifest.model.dim)
        if table.dtype != np.float32 or table.shape != shape:
            raise ArtefactInvalid(f"{self.version}: {ITEM_TABLE} is {table.dtype}{list(table.shape)}")
        if not np.isfinite(table).all():
            raise ArtefactInvalid(f"{self.version}: {ITEM_TABLE} holds numbers that are not finite")
        return np.asarray(table, np.float32)


class Registry:
    """A folder of versions and aliases. What is trusted and who signs comes from the environment
    (`compression.releases.signing`) unless it is given."""

    def __init__(self, root: str | Path, *, trust: Trust | None = None, signer: Signer | None = None) -> None:
        self.root = Path(root)
        self._aliases = Aliases(self.root / "aliases")
        self._trust = trust
        self._signer = signer

    # Publishing --------------------------------------------------------------------------------

    def check_publishing(self) -> None:
        """Refuse now what would be refused after an hour of training: a folder that cannot be written, no
        key, or one that is not trusted."""
        versions = self.root / "versions"
        try:
            versions.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtefactInvalid(f"{self.root} cannot be written: {error.strerror}") from None
        if not os.access(versions, os.W_OK):
            raise ArtefactInvalid(f"{versions} cannot be written by this user")
        trust, signer = self._trusted(), self._signs()
        if not trust.required:
            return
        if signer is None:
            raise ArtefactInvalid(
                "only signed versions are used here, and TAILRACE_SIGNING_KEY names no key to sign with"
            )
        if signer.key_id not in trust.keys:
            raise ArtefactInvalid(f"the signing key {signer.key_id[:16]} is not among those trusted here")

    def publish(self, staging: Path, manifest: Manifest) -> Manifest:
        """Copy every file of `staging` in as `manifest.version`, signed where there is a key to sign
        with; all of it appears at once or not at all."""
        target = self._version_path(manifest.version)
        if target.exists():
            raise ArtefactInvalid(f"{manifest.version} is already published")
        signer = self._signs()
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
            if signer is not None:
                (work / SIGNATURE).write_bytes(signer.sign(complete.to_bytes()))
            for path in work.iterdir():
                fsync(path)
            fsync(work)
            work.chmod(0o755)
            work.rename(target)
            fsync(target.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return complete

    def sign(self, version: str) -> str:
        """Vouch for a version that is there already: its files are checked, then its manifest is signed.
        The id of the key."""
        signer = self._signs()
        if signer is None:
            raise ArtefactInvalid("TAILRACE_SIGNING_KEY names no key to sign with")
        data = self._manifest_bytes(version)
        artefact = Artefact(self._version_path(version), _parse(data, version), _sha256(data))
        artefact.read_all()
        write_whole(artefact.path / SIGNATURE, signer.sign(data))
        return signer.key_id

    # Reading -----------------------------------------------------------------------------------

    def versions(self) -> list[str]:
        """Published versions, oldest name first."""
        folder = self.root / "versions"
        if not folder.is_dir():
            return []
        return sorted(p.name for p in folder.iterdir() if is_name(p.name) and p.is_dir())

    def manifest(self, version: str) -> Manifest:
        """What a version says of itself, unchecked: for showing, not for serving."""
        return _parse(self._manifest_bytes(version), version)

    def signed_by(self, version: str) -> str | None:
        """The trusted key that signed a version's manifest; None where it is unsigned and may be."""
        return self._check_signature(version, self._manifest_bytes(version))

    def resolve(self, alias_or_version: str) -> str:
        """The version an alias stands for; a version stands for itself."""
        return self._resolve(alias_or_version)[0]

    def manifest_sha256(self, version: str) -> str:
        """The checksum that an announcement of the version carries."""
        return self._release(version).manifest_sha256

    def open(
        self,
        alias_or_version: str = SERVING,
        *,
        sha256: str | None = None,
        check_files: bool = True,
        kind: Kind | None = None,
        serves: bool = True,
    ) -> Artefact:
        """A version whose signature and every file have been verified, or `ArtefactInvalid` with the
        reason. `sha256` is the manifest's, where somebody promised one. Without `check_files` a file is
        verified when it is read, and not before. A version of another `kind` is refused (None: any), and
        where it is to serve, one without graphs."""
        version, promoted = self._resolve(alias_or_version)
        data = self._manifest_bytes(version)
        digest = _sha256(data)
        if promoted is not None and promoted != digest:
            raise ArtefactInvalid(f"{version}: the manifest is not the one that was promoted")
        if sha256 is not None and sha256 != digest:
            raise ArtefactInvalid(f"{version}: announced with checksum {sha256[:12]}…, found {digest[:12]}…")
        self._check_signature(version, data)
        artefact = Artefact(self._version_path(version), _parse(data, version), digest)
        if kind is not None:
            _check_kind(artefact.manifest, kind)
        if serves:
            _check_serves(artefact.manifest)
        if check_files:
            artefact.read_all()
        return artefact

    # Stages ------------------------------------------------------------------------------------

    def state(self, alias: str = SERVING) -> AliasState | None:
        """Who serves, who is tried and who served before; None where nobody was promoted yet."""
        return self._aliases.read(alias)

    def promote(self, version: str, alias: str = SERVING) -> AliasState:
        """Make the alias stand for a version, in one atomic step; the version before is kept in mind."""
        release = self._release(version)
        return self._aliases.change(
            alias, lambda state: state.promoted(release) if state else AliasState(**release.model_dump())
        )

    def canary(self, version: str, percent: float, alias: str = SERVING) -> AliasState:
        """Give a version a share of the alias's users."""
        release = self._release(version)
        return self._aliases.change(alias, lambda state: _promoted(state).with_canary(release, percent))

    def shadow(self, version: str, percent: float, alias: str = SERVING) -> AliasState:
        """Let a version rank a share of the alias's requests, for comparison only."""
        release = self._release(version)
        return self._aliases.change(alias, lambda state: _promoted(state).with_shadow(release, percent))

    def retire(self, version: str, alias: str = SERVING) -> AliasState:
        """End a version's time as canary or shadow."""
        return self._aliases.change(alias, lambda state: _promoted(state).retired(version))

    def rollback(self, alias: str = SERVING) -> AliasState:
        """Let the version before serve again, all users."""
        return self._aliases.change(alias, lambda state: _promoted(state).rolled_back())

    # -------------------------------------------------------------------------------------------

    def _resolve(self, alias_or_version: str) -> tuple[str, str | None]:
        state = self._aliases.read(alias_or_version)
        if state is not None:
            return state.version, state.manifest_sha256
        if not self._version_path(alias_or_version).is_dir():
            raise ArtefactInvalid(
                f"no version or alias {alias_or_version!r} in {self.root}; "
                "`tailrace retrain --log FILE` publishes one"
            )
        return alias_or_version, None

    def _release(self, version: str) -> Release:
        state = self._aliases.read(version)
        if state is not None and not self._version_path(version).is_dir():
            raise ReleaseRefused(f"{version!r} is an alias, which stands for {state.version}: name a version")
        data = self._manifest_bytes(version)
        _check_serves(_parse(data, version))
        return Release(version=version, manifest_sha256=_sha256(data))

    def _manifest_bytes(self, version: str) -> bytes:
        return read_plain(self._version_path(version) / MANIFEST, MAX_MANIFEST_BYTES, version)

    def _check_signature(self, version: str, manifest: bytes) -> str | None:
        path = self._version_path(version) / SIGNATURE
        signature = read_plain(path, MAX_SIGNATURE_BYTES, version) if os.path.lexists(path) else None
        return self._trusted().check(version, manifest, signature)

    def _trusted(self) -> Trust:
        return self._trust or Trust.from_environment()

    def _signs(self) -> Signer | None:
        return self._signer or Signer.from_environment()

    def _version_path(self, version: str) -> Path:
        check_name(version)
        return self.root / "versions" / version


def read_item_table(content: bytes) -> npt.NDArray[Any]:
    """The array of an .npy file. A table in 8 bits, `codes` int8 [dim] and their `step` float32 in each
    row, comes as the float32 [rows, dim] that it stands for; `ValueError` where the bytes are no array."""
    table = read_npy(content)
    if table.dtype.names != ("codes", "step"):
        return table
    codes, step = table["codes"], table["step"]
    if codes.dtype != np.int8 or codes.ndim != 2 or step.dtype != np.float32:
        raise ValueError(f"its codes are {codes.dtype}{list(codes.shape)}, its steps {step.dtype}")
    return np.asarray(codes * step[:, None], np.float32)


def write_item_table(
    path: Path, table: npt.NDArray[np.float32 | np.int8], step: npt.NDArray[np.float32] | None = None
) -> None:
    """Float32 [rows, dim] as it is; with the `step` [rows] of each row its codes, int8 [rows, dim]."""
    rows: npt.NDArray[Any] = np.ascontiguousarray(table)
    if step is not None:
        rows = np.empty(len(table), [("codes", np.int8, (table.shape[1],)), ("step", np.float32)])
        rows["codes"], rows["step"] = table, step
    with path.open("wb") as file:
        np.save(file, rows, allow_pickle=False)


def _promoted(state: AliasState | None) -> AliasState:
    if state is None:
        raise ReleaseRefused("no version serves yet: `tailrace models promote VERSION` comes first")
    return state


def _parse(data: bytes, version: str) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise ArtefactInvalid(f"{version}: manifest: {first_fault(error)}") from None
    if manifest.version != version:
        raise ArtefactInvalid(f"{version}: the manifest is of version {manifest.version}")
    _check_complete(manifest)
    return manifest


def _check_file_name(name: str, version: str) -> None:
    if not is_name(name) or name in (MANIFEST, SIGNATURE):
        raise ArtefactInvalid(f"{version}: {name!r} is not a plain file name")


def _check_kind(manifest: Manifest, kind: Kind) -> None:
    if manifest.kind != kind:
        raise ArtefactInvalid(f"{manifest.version} is a {manifest.kind} model, not a {kind} model")


def _check_serves(manifest: Manifest) -> None:
    if not manifest.graphs:
        raise ArtefactInvalid(
            f"{manifest.version} is a {manifest.kind} model without graphs, published to be evaluated only; "
            "published anew it has them"
        )


def _check_complete(manifest: Manifest) -> None:
    if len(manifest.files) > MAX_FILES:
        raise ArtefactInvalid(f"{manifest.version}: more than {MAX_FILES} files")
    for name in manifest.files:
        _check_file_name(name, manifest.version)
    serves = manifest.kind == "ranking" or bool(manifest.graphs)
    for name in (*manifest.graphs.values(), VOCABULARY, *((ITEM_TABLE,) if serves else ())):
        if name not in manifest.files:
            raise ArtefactInvalid(f"{manifest.version}: {name} is missing")
    missing = {"encode", "score", "rank"} - set(manifest.graphs) if serves else ()
    if missing:
        raise ArtefactInvalid(f"{manifest.version}: no graph named {', '.join(sorted(missing))}")
    if "append" in manifest.graphs and not manifest.model.states:
        raise ArtefactInvalid(f"{manifest.version}: it keeps no states that events could be appended to")


def _entry(path: Path) -> FileEntry:
    return FileEntry(sha256=sha256_of(path), bytes=path.stat().st_size)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
