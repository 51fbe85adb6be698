"""What an alias stands for: who serves, who is tried beside it, and who served before.

    aliases/<alias>.json    {"version", "manifest_sha256", "previous", "canary", "shadow"}

A state is a value; each change gives the next one. A worker that starts reads the same split of
traffic that the others have.
"""

from __future__ import annotations

import fcntl
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compression.errors import ArtefactInvalid, ReleaseRefused, first_fault
from compression.files import read_plain, write_whole

MAX_ALIAS_BYTES: Final = 64 * 1024
STEPS_PER_PERCENT: Final = 100

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Percent = Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)]


class Release(BaseModel):
    """A version, and the checksum of the manifest that is meant."""

    model_config = ConfigDict(frozen=True, strict=True)

    version: str
    manifest_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Trial(Release):
    """A version beside the one that serves. Of a canary `percent` is the share of users who get its
    lists, of a shadow the share of requests that it ranks for comparison; in steps of 0.01."""

    percent: Percent


class AliasState(Release):
    """`version` serves. At most one canary and one shadow; neither is the version that serves."""

    previous: Release | None = None
    canary: Trial | None = None
    shadow: Trial | None = None

    @property
    def serving(self) -> Release:
        return Release(version=self.version, manifest_sha256=self.manifest_sha256)

    def stages(self) -> dict[str, str]:
        """version → stage, of every version that has one."""
        found = {"previous": self.previous, "shadow": self.shadow, "canary": self.canary, "serving": self}
        return {release.version: stage for stage, release in found.items() if release is not None}

    def promoted(self, release: Release) -> Self:
        """The release serves; the one before it is kept to go back to, and is no trial any more."""
        if release.version == self.version:
            return self._with(manifest_sha256=release.manifest_sha256)
        return self._without_trial(release.version)._with(
            version=release.version, manifest_sha256=release.manifest_sha256, previous=self.serving
        )

    def with_canary(self, release: Release, percent: float) -> Self:
        """The release gets a share of the users; another canary ends."""
        self._check_trial(release, "canary")
        trial = Trial(**release.model_dump(), percent=steps(percent) / STEPS_PER_PERCENT)
        return self._without_trial(release.version)._with(canary=trial)

    def with_shadow(self, release: Release, percent: float) -> Self:
        """The release ranks a share of the requests for comparison; another shadow ends."""
        self._check_trial(release, "shadow")
        trial = Trial(**release.model_dump(), percent=steps(percent) / STEPS_PER_PERCENT)
        return self._without_trial(release.version)._with(shadow=trial)

    def retired(self, version: str) -> Self:
        """The version is no canary or shadow any more."""
        if version not in {trial.version for trial in (self.canary, self.shadow) if trial is not None}:
            raise ReleaseRefused(
                f"{version} is neither canary nor shadow: `tailrace models list` shows who is"
            )
        return self._without_trial(version)

    def rolled_back(self) -> Self:
        """The version before serves all users. There is no second step back: it would lead forward."""
        if self.previous is None:
            raise ReleaseRefused(
                f"{self.version} has no version before it to go back to: `tailrace models promote` takes any"
            )
        before = self.previous
        return self._without_trial(before.version)._with(
            version=before.version, manifest_sha256=before.manifest_sha256, previous=None, canary=None
        )

    def _check_trial(self, release: Release, stage: str) -> None:
        if release.version == self.version:
            raise ReleaseRefused(f"{release.version} serves already and cannot be its own {stage}")

    def _without_trial(self, version: str) -> Self:
        ended = {
            stage: None
            for stage, trial in (("canary", self.canary), ("shadow", self.shadow))
            if trial is not None and trial.version == version
        }
        return self._with(**ended)

    def _with(self, **changes: Any) -> Self:
        return self.model_copy(update=changes)


Change = Callable[[AliasState | None], AliasState]


class Aliases:
    """The folder of alias files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, alias: str) -> AliasState | None:
        """What the alias stands for, None where there is no such alias, `ArtefactInvalid` where its file
        says nothing."""
        check_name(alias)
        path = self._folder / f"{alias}.json"
        if not path.is_file():
            return None
        try:
            body = json.loads(read_plain(path, MAX_ALIAS_BYTES, alias))
            state = AliasState.model_validate(body)
        except ValidationError as error:
            raise ArtefactInvalid(f"alias {alias!r} cannot be read: {first_fault(error)}") from None
        except (ValueError, RecursionError) as error:
            raise ArtefactInvalid(f"alias {alias!r} cannot be read: {error}") from None
        for release in (state, state.previous, state.canary, state.shadow):
            if release is not None:
                check_name(release.version)
        return state

    def change(self, alias: str, change: Change) -> AliasState:
        """Read, change, write, as one step among processes of this machine."""
        check_name(alias)
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            state = change(self.read(alias))
            body = state.model_dump(exclude_none=True)
            write_whole(self._folder / f"{alias}.json", json.dumps(body, indent=1).encode())
        return state

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def steps(percent: float) -> int:
    """Hundredths of a percent; `ReleaseRefused` where it is none of 0.01 … 100."""
    found = round(percent * STEPS_PER_PERCENT) if math.isfinite(percent) else 0
    if not 1 <= found <= 100 * STEPS_PER_PERCENT or abs(found - percent * STEPS_PER_PERCENT) > 1e-6:
        raise ReleaseRefused(f"a share is 0.01 to 100 percent in steps of 0.01, not {percent:g}")
    return found


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ArtefactInvalid(f"{name!r} is not a version or alias: letters, digits, . _ - only")


def is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None
