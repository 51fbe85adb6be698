"""TensorRT plans kept between starts: a plan takes minutes to build and fits one GPU and one version.

    <key>.plan   what TensorRT made
    <key>.json   its length, its sha256 and what it was made from; written last

A plan is code for the GPU. Only a folder that nobody else can write to is used, and only a plan whose
checksum is the one in its own record is loaded; any other is built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np

from compression.files import write_whole
from inference.own_folder import own_folder, user_cache
from inference.types import Tensors

MAX_PLAN_BYTES: Final = 8 * 2**30
_MODE: Final = 0o600

Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class PlanKey:
    """Everything a plan depends on. `profile` holds the smallest and largest shape of each input."""

    onnx_sha256: str
    gpu: str
    capability: str
    tensorrt: str
    precision: str
    profile: Profile

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def profile_of(examples: Sequence[Tensors]) -> Profile:
    """The smallest and largest sizes of each input over all examples, axis by axis."""
    shapes = {name: np.array([example[name].shape for example in examples]) for name in examples[0]}
    return {name: (tuple(seen.min(0).tolist()), tuple(seen.max(0).tolist())) for name, seen in shapes.items()}


class PlanCache:
    """Plans in a folder of this user's own, made where it is missing."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = own_folder(folder or user_cache() / "plans")

    def get(self, key: PlanKey) -> bytes | None:
        """The plan of a key, or None where there is none that is whole and its own."""
        name = key.digest()
        try:
            record = json.loads(self._read(f"{name}.json", 2**20))
            plan = self._read(f"{name}.plan", MAX_PLAN_BYTES)
            promised = record["sha256"], record["made_from"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        own = json.loads(json.dumps(asdict(key)))
        return plan if promised == (hashlib.sha256(plan).hexdigest(), own) else None

    def put(self, key: PlanKey, plan: bytes) -> None:
        """Keep a plan; a reader sees the old one, none, or all of the new one."""
        name = key.digest()
        record = {"sha256": hashlib.sha256(plan).hexdigest(), "bytes": len(plan), "made_from": asdict(key)}
        # Without its record a plan is none, so a plan is never paired with a record of another.
        (self.folder / f"{name}.json").unlink(missing_ok=True)
        write_whole(self.folder / f"{name}.plan", plan, _MODE)
        write_whole(self.folder / f"{name}.json", json.dumps(record, indent=1).encode(), _MODE)

    def _read(self, name: str, limit: int) -> bytes:
        descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            size = os.fstat(descriptor)
            if not stat.S_ISREG(size.st_mode) or size.st_size > limit:
                raise ValueError(f"{name} is no plain file of at most {limit} bytes")
            return file.read()
