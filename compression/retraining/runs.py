"""A retraining's folder: what each step made, so that one that was killed goes on at its step.

    <run>/run.json          what was asked for, the steps that are done and what they said, the outcome
    <run>/progress.json     how far the step at work is, for whoever watches
    <run>/report.html       the run for a person
    <run>/sequences.npz …   what a later step reads; removed when the run has ended

JSON, npz without pickle and safetensors only; each file is replaced whole.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from compression.errors import first_fault
from compression.files import write_whole

KEEP: Final = 20
STATE: Final = "run.json"
PROGRESS: Final = "progress.json"
REPORT: Final = "report.html"
MAX_STATE_BYTES: Final = 4 * 2**20
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PROGRESS_S: Final = 1.0

Outcome = Literal["running", "published", "refused", "failed"]


class RunInvalid(ValueError):
    """A run that cannot be gone on with; the message says why."""


class Step(BaseModel):
    """A step that is done. `seconds` counts the attempt that finished it."""

    model_config = ConfigDict(frozen=True)

    seconds: float
    finished_at: str
    result: dict[str, Any] = {}


class RunState(BaseModel):
    """All that a run has to know of itself. `version` is the name it will publish under."""

    schema_version: Literal[1] = 1
    run: str
    version: str
    created_at: str
    spec: dict[str, Any] = {}
    steps: dict[str, Step] = {}
    outcome: Outcome = "running"
    detail: str = ""
    attempts: int = 0


class Run:
    """One run, locked against a second process while it is entered."""

    def __init__(self, folder: Path, state: RunState) -> None:
        self.folder = folder
        self.state = state
        self._lock: Any = None
        self._told_s = 0.0

    @classmethod
    def begin(cls, root: Path, name: str | None = None, spec: dict[str, Any] | None = None) -> Run:
        """A new run, or the one of that name as it was left."""
        if name is not None and (root / name / STATE).is_file():
            return cls.find(root, name)
        now = datetime.now(UTC)
        run = name or new_name()
        if not _NAME.fullmatch(run):
            raise RunInvalid(f"{run!r} is no name for a run: letters, digits, . _ - only")
        state = RunState(
            run=run,
            version=f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:4]}",
            created_at=now.isoformat(timespec="seconds"),
            spec=spec or {},
        )
        found = cls(root / run, state)
        try:
            found.save()
        except OSError as error:
            raise RunInvalid(f"{root} cannot be written: {error.strerror}") from None
        return found

    @classmethod
    def find(cls, root: Path, name: str) -> Run:
        """A run that was begun; `RunInvalid` where there is none or its state says nothing."""
        path = root / name / STATE
        if not _NAME.fullmatch(name) or not path.is_file():
            raise RunInvalid(f"there is no run {name!r} in {root}: each folder there is one")
        try:
            if path.stat().st_size > MAX_STATE_BYTES:
                raise RunInvalid(f"{path} is larger than a run's state can be")
            return cls(root / name, RunState.model_validate_json(path.read_bytes()))
        except ValidationError as error:
            raise RunInvalid(f"{path} cannot be read: {first_fault(error)}") from None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise RunInvalid(
                f"another process is at work on run {self.state.run}: let it end first"
            ) from None
        self.state = self.find(self.folder.parent, self.folder.name).state
        self.state.attempts += 1
        self.state.outcome, self.state.detail = "running", ""
        self.save()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def done(self, step: str) -> dict[str, Any] | None:
        """What a step said when it was done; None where it was not."""
        found = self.state.steps.get(step)
        return found.result if found else None

    def finish(self, step: str, seconds: float, result: dict[str, Any]) -> None:
        """The step is done; what later steps read lies in the folder already."""
        plain = orjson.loads(orjson.dumps(result, option=orjson.OPT_SERIALIZE_NUMPY))
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        self.state.steps[step] = Step(seconds=round(seconds, 3), finished_at=finished, result=plain)
        self.save()

    def forget(self, step: str) -> None:
        """The step is to be done again."""
        self.state.steps.pop(step, None)

    def end(self, outcome: Outcome, detail: str = "") -> None:
        """Nothing follows, or (failed) the run may be taken up again."""
        self.state.outcome, self.state.detail = outcome, detail
        self.save()

    def tell(self, step: str, fraction: float, note: str) -> None:
        """For whoever watches the run; at most once a second."""
        now_s = time.time()
        if now_s - self._told_s >= _PROGRESS_S or fraction in (0.0, 1.0):
            self._told_s = now_s
            told = {"step": step, "fraction": round(fraction, 4), "note": note, "at": round(now_s, 3)}
            (self.folder / PROGRESS).write_bytes(orjson.dumps(told))

    def clear(self, *names: str) -> None:
        """Remove what no later step reads."""
        for name in names:
            path = self.folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def save(self) -> None:
        write_whole(self.folder / STATE, self.state.model_dump_json(indent=1).encode())


def new_name() -> str:
    """A name for a run, in the order of time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"


def runs(root: Path) -> list[Run]:
    """Every run that can be read, oldest first."""
    found = []
    for path in sorted(root.glob(f"*/{STATE}")):
        try:
            found.append(Run.find(root, path.parent.name))
        except RunInvalid:
            continue
    return sorted(found, key=lambda run: (run.state.created_at, run.state.run))


def prune(root: Path, keep: int = KEEP) -> None:
    """Remove the folders of the oldest runs that have ended."""
    ended = [run for run in runs(root) if run.state.outcome != "running"]
    for run in ended[:-keep]:
        shutil.rmtree(run.folder, ignore_errors=True)
