"""One file of weights for the graphs of a version.

ONNX Runtime writes the weights of each optimised graph into a file of its own, and those of our graphs are
nearly all the same: the item table three times. Kept once, they are written, verified and mapped once, and
what one graph has brought into a processor's caches is there for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

import onnx

SHARED: Final = "weights"
_ALIGNMENT: Final = 4096  # files are mapped by pages


def share_weights(paths: Sequence[Path]) -> None:
    """Rewrite graphs of one folder, whose large weights lie in files of their own, so that all have theirs in
    one file, and equal ones in one place of it. The files that they had are deleted."""
    left: set[Path] = set()
    places: dict[int, list[tuple[bytes, int]]] = {}
    with (paths[0].parent / SHARED).open("xb") as shared:
        for path in paths:
            model = onnx.load(path, load_external_data=False)
            for tensor in model.graph.initializer:
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    left.add(path.with_name(_told(tensor)["location"]))
                    _move(tensor, path.parent, shared, places)
            path.write_bytes(model.SerializeToString())
    for path in left:
        path.unlink()


def _move(
    tensor: onnx.TensorProto, folder: Path, shared: IO[bytes], places: dict[int, list[tuple[bytes, int]]]
) -> None:
    """`places`: by length, what `shared` holds already, and where."""
    told = _told(tensor)
    with (folder / told["location"]).open("rb") as file:
        file.seek(int(told.get("offset", 0)))
        data = file.read(int(told["length"]))
    alike = places.setdefault(len(data), [])
    place = next((place for known, place in alike if known == data), None)
    if place is None:
        place = shared.seek(-(-shared.tell() // _ALIGNMENT) * _ALIGNMENT)
        shared.write(data)
        alike.append((data, place))
    del tensor.external_data[:]
    for key, value in (("location", SHARED), ("offset", place), ("length", len(data))):
        tensor.external_data.add(key=key, value=str(value))


def _told(tensor: onnx.TensorProto) -> dict[str, str]:
    """Where its data are: `location`, `length`, perhaps `offset`."""
    return {entry.key: entry.value for entry in tensor.external_data}
