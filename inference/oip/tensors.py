"""Tensors from outside, checked before they are believed.

Nothing is allocated by what a shape claims: a shape is multiplied out in Python's integers and has to
agree with the bytes that came.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from inference.errors import InvalidRequest
from inference.oip.models import DTYPES, TensorSpec
from inference.types import Tensors


@dataclass(frozen=True, slots=True)
class Given:
    """A tensor as it came: raw little-endian bytes, or the flat numbers that a front has parsed."""

    name: str
    datatype: str
    shape: Sequence[int]
    data: bytes | memoryview | npt.NDArray[Any]


def check(given: Sequence[Given], specs: Sequence[TensorSpec], most: Mapping[str, int]) -> Tensors:
    """The tensors by name, C-contiguous and read-only, or `InvalidRequest` with the first fault."""
    by_name = {spec.name: spec for spec in specs}
    arrays: Tensors = {}
    sizes: dict[str, tuple[int, str]] = {}
    for tensor in given:
        spec = by_name.get(tensor.name)
        if spec is None:
            raise InvalidRequest(f"no input is called {tensor.name[:64]!r}; there are {', '.join(by_name)}")
        if tensor.name in arrays:
            raise InvalidRequest(f"input {tensor.name} is given twice")
        if tensor.datatype != spec.datatype:
            raise InvalidRequest(f"input {tensor.name} is {spec.datatype}, not {tensor.datatype[:16]!r}")
        _check_shape(tensor, spec, most, sizes)
        arrays[tensor.name] = _array(tensor, spec)
    missing = [spec.name for spec in specs if spec.name not in arrays and not spec.optional]
    if missing:
        raise InvalidRequest(f"input {missing[0]} is missing")
    for name, array in arrays.items():
        _check_values(array, by_name[name], sizes)
    return arrays


def _check_shape(
    tensor: Given, spec: TensorSpec, most: Mapping[str, int], sizes: dict[str, tuple[int, str]]
) -> None:
    """Also notes the free sizes, with the tensor that fixed them."""
    name = tensor.name
    if len(tensor.shape) != len(spec.sizes):
        raise InvalidRequest(f"input {name} has {len(spec.sizes)} dimensions, not {len(tensor.shape)}")
    for axis, (size, wanted) in enumerate(zip(tensor.shape, spec.sizes, strict=True)):
        if isinstance(wanted, int):
            if size != wanted:
                raise InvalidRequest(f"input {name}: dimension {axis} is {wanted}, not {size}")
            continue
        if not 1 <= size <= most[wanted]:
            raise InvalidRequest(
                f"input {name}: {wanted} (dimension {axis}) is 1 to {most[wanted]}, not {size}"
            )
        fixed, by = sizes.setdefault(wanted, (size, name))
        if size != fixed:
            raise InvalidRequest(f"input {name} has {size} {wanted}, input {by} has {fixed}")


def _array(tensor: Given, spec: TensorSpec) -> npt.NDArray[Any]:
    dtype, count = DTYPES[spec.datatype], math.prod(tensor.shape)
    if not isinstance(tensor.data, np.ndarray):
        if len(tensor.data) != count * dtype.itemsize:
            raise InvalidRequest(
                f"input {tensor.name} has {len(tensor.data)} bytes; its shape makes {count * dtype.itemsize}"
            )
        return np.frombuffer(tensor.data, dtype).reshape(tensor.shape)
    if tensor.data.size != count:
        raise InvalidRequest(f"input {tensor.name} has {tensor.data.size} numbers; its shape makes {count}")
    return _converted(tensor.data, tensor.name, dtype).reshape(tensor.shape)


def _converted(data: npt.NDArray[Any], name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Numbers in the tensor's own type; a fraction or a large number does not become another integer."""
    if data.dtype == dtype:
        return data
    if dtype.kind == "f":
        if data.dtype.kind not in "iuf":
            raise InvalidRequest(f"input {name} holds something other than numbers")
        with np.errstate(over="ignore"):  # infinity is refused with the other values
            return data.astype(dtype)
    bounds = np.iinfo(dtype)
    if data.dtype.kind not in "iu" or (data.size and (data.min() < bounds.min or data.max() > bounds.max)):
        raise InvalidRequest(f"input {name} holds something other than {bounds.bits}-bit integers")
    return data.astype(dtype)


def _check_values(array: npt.NDArray[Any], spec: TensorSpec, sizes: Mapping[str, tuple[int, str]]) -> None:
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise InvalidRequest(f"input {spec.name} holds numbers that are not finite")
        return
    high = sizes[spec.high][0] if isinstance(spec.high, str) else spec.high
    if spec.low == 0:
        # Seen as unsigned, what is negative is large: one look at the numbers finds both faults.
        unsigned = array.view(f"u{array.itemsize}")
        if unsigned.max() <= (np.iinfo(array.dtype).max if high is None else high):
            return
    if spec.low is not None and array.min() < spec.low:
        raise InvalidRequest(f"input {spec.name} holds {array.min()}; {spec.low} is the least allowed")
    if high is not None and array.max() > high:
        raise InvalidRequest(f"input {spec.name} holds {array.max()}; {high} is the most allowed")
