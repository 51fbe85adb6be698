"""Which engines a process runs side by side, as one line of text.

    onnx*2                                     two threads, an engine each
    onnx*2; openvino,precision=bf16            three lanes of unlike engines
    onnx; remote,url=10.0.0.7:8001,region=eu,hop_ms=12

Entries end with `;`. Behind an engine's name come how many of it, and options that only this entry has.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Final

from inference.engines.base import EngineOptions

LOCAL: Final = "local"
_HEAD: Final = re.compile(r"([a-z][a-z0-9_]*)(?:\*([1-9]\d?))?")


class LanesInvalid(ValueError):
    """A description of lanes that cannot be read; the message says where."""


@dataclass(frozen=True, slots=True)
class LaneSpec:
    """One lane to be: an engine with its options, and how far away it is."""

    name: str
    engine: str
    options: EngineOptions
    region: str = LOCAL
    hop_ms: float = 0.0

    @property
    def kind(self) -> tuple[str, EngineOptions]:
        """What lanes have in common that an engine of one may serve."""
        return self.engine, self.options


def parse_lanes(text: str, defaults: EngineOptions) -> list[LaneSpec]:
    """One spec per lane, in order. Raises `LanesInvalid`."""
    specs: list[LaneSpec] = []
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        head, *told = (part.strip() for part in entry.split(","))
        found = _HEAD.fullmatch(head)
        if found is None:
            raise LanesInvalid(f"{head!r} is not an engine's name, or its name and *COUNT")
        options, region, hop_ms = defaults, LOCAL, 0.0
        for pair in told:
            key, _, value = (part.strip() for part in pair.partition("="))
            if key == "region":
                region = value
            elif key == "hop_ms":
                hop_ms = _number(entry, key, value, float)
            else:
                options = _with(options, entry, key, value)
        label = "-".join([found[1], *([options.precision] if options.precision != "f32" else [])])
        label = label if region == LOCAL else f"{label}-{region}"
        for _ in range(int(found[2] or 1)):
            taken = sum(spec.name.rpartition("-")[0] == label for spec in specs)
            specs.append(LaneSpec(f"{label}-{taken}", found[1], options, region, hop_ms))
    if not specs:
        raise LanesInvalid("there is no lane")
    return specs


def _with(options: EngineOptions, entry: str, key: str, value: str) -> EngineOptions:
    known = {field.name: field for field in dataclasses.fields(EngineOptions)}
    if key not in known or not value:
        listed = ", ".join([*known, "region", "hop_ms"])
        raise LanesInvalid(f"{entry!r}: {key!r} is not one of {listed}, or has no value")
    kind = type(getattr(options, key))
    return dataclasses.replace(options, **{key: _number(entry, key, value, kind)})


def _number(entry: str, key: str, value: str, kind: type[Any]) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise LanesInvalid(f"{entry!r}: {key}={value} is not a number") from None
