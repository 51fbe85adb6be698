"""What the alias stands for, read from the registry's folder."""

from __future__ import annotations

import asyncio
from pathlib import Path

from compression.errors import ArtefactInvalid
from compression.releases.aliases import AliasState
from compression.releases.registry import Registry
from inference.errors import ModelUnavailable


class Alias:
    """An alias of a registry, or the name of a version, which then serves by itself."""

    def __init__(self, registry: Path, name: str) -> None:
        self.registry = registry
        self.name = name

    async def read(self) -> AliasState:
        """Raises `ModelUnavailable` with the reason, whatever the folder holds."""
        try:
            return await asyncio.to_thread(self._read)
        except (ArtefactInvalid, OSError) as error:
            raise ModelUnavailable(str(error)) from error
        except Exception as error:
            raise ModelUnavailable(f"alias {self.name!r}: {error!r}") from error

    def _read(self) -> AliasState:
        registry = Registry(self.registry)
        return registry.state(self.name) or _alone(registry, registry.resolve(self.name))

    async def resolve(self, name: str, sha256: str | None = None) -> AliasState:
        """A version, or what another alias stands for now, serving with nothing tried beside it."""
        try:
            registry = Registry(self.registry)
            state = await asyncio.to_thread(lambda: _alone(registry, registry.resolve(name)))
        except (ArtefactInvalid, OSError) as error:
            raise ModelUnavailable(str(error)) from error
        return state if sha256 is None else state.model_copy(update={"manifest_sha256": sha256})


def _alone(registry: Registry, version: str) -> AliasState:
    return AliasState(version=version, manifest_sha256=registry.manifest_sha256(version))


def names_another(state: AliasState, announced: str, sha256: str | None) -> str | None:
    """How an announcement contradicts the alias, in a sentence; None where it does not."""
    named = (state.previous, state.shadow, state.canary, state.serving)
    known = {release.version: release.manifest_sha256 for release in named if release is not None}
    found = known.get(announced)
    if found is None or sha256 is None or found == sha256:
        return None
    return f"{announced}: announced with checksum {sha256[:12]}…, found {found[:12]}…"
