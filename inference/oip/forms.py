"""Requests that are like one before but for their numbers, read without parsing them again.

A client sends the same message over and over: names, types and shapes stay, the raw contents behind them
change. A form is such a message with gaps for the contents. A message of the same length whose other bytes
are all the same means the same, so that what was found out about the first one holds for it: which model,
which outputs, how large each tensor is. The numbers themselves are checked every time.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError

from inference.oip import open_inference_pb2 as pb
from inference.oip.models import DTYPES, Answer, ServedModel
from inference.oip.service import Call
from inference.types import Tensors

_RAW_INPUT: Final = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
_RAW_OUTPUT: Final = pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER
_MOST: Final = 64  # forms kept, those used last
_UNSIGNED: Final[dict[str, np.dtype[Any]]] = {"INT32": np.dtype("<u4"), "INT64": np.dtype("<u8")}


@dataclass(frozen=True, slots=True)
class _Gap:
    """Where the numbers of an input are, and which are allowed: 0 to `high`."""

    name: str
    mark: bytes  # what stands before them: the field, and their length
    at: int
    dtype: np.dtype[Any]
    unsigned: np.dtype[Any]
    shape: tuple[int, ...]
    count: int
    high: int


@dataclass(slots=True, eq=False)
class Form:
    """A message with gaps. `heads` are the beginnings of answers, by version and shapes of
    the outputs."""

    length: int
    head: bytes
    gaps: Sequence[_Gap]
    model: weakref.ref[ServedModel]  # a version that has gone is not kept alive
    call: Call
    heads: dict[tuple[Any, ...], bytes]

    def fits(self, message: bytes) -> bool:
        return message.startswith(self.head) and all(
            message.startswith(gap.mark, gap.at - len(gap.mark)) for gap in self.gaps
        )

    def tensors(self, message: bytes) -> Tensors | None:
        """The inputs, C-contiguous and read-only; None where a number is not allowed."""
        tensors: Tensors = {}
        for gap in self.gaps:
            # Seen as unsigned, what is negative is large: one look at the numbers finds both faults.
            numbers = np.frombuffer(message, gap.unsigned, gap.count, gap.at)
            if np.maximum.reduce(numbers) > gap.high:
                return None
            tensors[gap.name] = numbers.view(gap.dtype).reshape(gap.shape)
        return tensors


class Forms:
    """The forms seen last, by the length of their messages."""

    def __init__(self) -> None:
        self._forms: OrderedDict[int, Form] = OrderedDict()

    def find(self, message: bytes) -> Form | None:
        form = self._forms.get(len(message))
        if form is None or not form.fits(message):
            return None
        self._forms.move_to_end(len(message))
        return form

    def learn(self, message: bytes, request: Any, call: Call, model: ServedModel) -> None:
        """From a request that was answered. One whose contents do not stand alone at the end of its message,
        or are not all bounded integers, has no form."""
        gaps, at = [], len(message)
        sizes = _sizes(request, model)
        specs = {spec.name: spec for spec in model.inputs}
        for tensor, content in zip(
            reversed(request.inputs), reversed(request.raw_input_contents), strict=False
        ):
            spec = specs[tensor.name]
            high = sizes[spec.high] if isinstance(spec.high, str) else spec.high
            if spec.low != 0 or high is None or spec.datatype not in _UNSIGNED:
                return
            at -= len(content)
            before = mark(_RAW_INPUT, len(content))
            dtype, unsigned = DTYPES[spec.datatype], _UNSIGNED[spec.datatype]
            shape = tuple(tensor.shape)
            gaps.append(
                _Gap(tensor.name, before, at, dtype, unsigned, shape, len(content) // dtype.itemsize, high)
            )
            at -= len(before)
        form = Form(len(message), message[: max(at, 0)], gaps[::-1], weakref.ref(model), call, {})
        if at <= 0 or not gaps or not form.fits(message):
            return
        try:
            if pb.ModelInferRequest.FromString(form.head).raw_input_contents:
                return
        except DecodeError:  # cut within a field
            return
        self._forms[len(message)] = form
        if len(self._forms) > _MOST:
            self._forms.popitem(last=False)


def serialise(form: Form | None, request_id: str, model: ServedModel, answer: Answer) -> bytes:
    """A ModelInferResponse. What stands before the contents is made once for each form."""
    outputs, version = answer
    key = (version, *(array.shape for array in outputs.values()))
    head = None if form is None else form.heads.get(key)
    if head is None:
        datatypes = {spec.name: spec.datatype for spec in model.outputs}
        response = pb.ModelInferResponse(
            model_name=model.name,
            model_version=version,
            id=request_id,
            outputs=[
                pb.ModelInferResponse.InferOutputTensor(
                    name=name, datatype=datatypes[name], shape=array.shape
                )
                for name, array in outputs.items()
            ],
        )
        head = bytes(response.SerializeToString())
        if form is not None and len(form.heads) < _MOST:
            form.heads[key] = head
    parts = [head]
    for array in outputs.values():
        parts += (mark(_RAW_OUTPUT, array.nbytes), array.tobytes())
    return b"".join(parts)


def _sizes(request: Any, model: ServedModel) -> dict[str, int]:
    """The free sizes, as the request's shapes have them."""
    specs = {spec.name: spec for spec in model.inputs}
    return {
        wanted: size
        for tensor in request.inputs
        for wanted, size in zip(specs[tensor.name].sizes, tensor.shape, strict=True)
        if isinstance(wanted, str)
    }


def mark(field: int, length: int) -> bytes:
    """What protobuf writes before so many bytes of a field."""
    written = bytearray([field << 3 | 2])
    while length > 127:
        written.append(length & 127 | 128)
        length >>= 7
    written.append(length)
    return bytes(written)
