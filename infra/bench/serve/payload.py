"""How each wire writes a request, and reads its scores."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from inference.buckets import HISTORIES, fit
from inference.types import Tensors
from infra.bench.serve.shape import CANDIDATES, COLUMNS, HISTORY, ROW

# To what a client pads the histories of a request: to the longest there may be, or to the next of a few
# lengths that the longest one in the request fits into.
Padding = Literal["whole", "bucket"]

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


def slots_of(rows: Int32, padding: Padding) -> int:
    """How many slots a client gives the histories in rows [lists, ROW]."""
    if padding == "whole":
        return HISTORY
    return fit(HISTORIES, int(rows[:, len(COLUMNS) * HISTORY].max()))


def tensors(rows: Int32, slots: int = HISTORY) -> Tensors:
    """The inputs of the `rank` graph in rows [lists, ROW], in so many slots."""
    inputs: Tensors = {
        name: np.ascontiguousarray(rows[:, place * HISTORY : place * HISTORY + slots])
        for place, name in enumerate(COLUMNS)
    }
    inputs["lengths"] = np.ascontiguousarray(rows[:, ROW - 2 * CANDIDATES - 1])
    inputs["candidates"] = np.ascontiguousarray(rows[:, ROW - 2 * CANDIDATES : -CANDIDATES])
    inputs["candidate_categories"] = np.ascontiguousarray(rows[:, -CANDIDATES:])
    return inputs


@dataclass(frozen=True, slots=True)
class Wire:
    """How a request [lists, ROW], in so many slots and for a model, is written, and its scores
    [lists, CANDIDATES] are read.

    `content_type` is of HTTP, where the path names the model; empty is gRPC.
    """

    write: Callable[[Int32, int, str], bytes]
    read: Callable[[bytes], Float32]
    content_type: str = ""


def _raw(rows: Int32, slots: int, _: str = "") -> bytes:
    """A row of `shape.row_ints` for each list."""
    if slots < HISTORY:
        columns = rows[:, : len(COLUMNS) * HISTORY].reshape(-1, len(COLUMNS), HISTORY)[:, :, :slots]
        rows = np.concatenate(
            [columns.reshape(len(rows), -1), rows[:, len(COLUMNS) * HISTORY :]], axis=1, dtype=np.int32
        )
    return rows.astype("<i4").tobytes()


def _raw_scores(answer: bytes) -> Float32:
    return np.frombuffer(answer, "<f4").reshape(-1, CANDIDATES)


def _base64(rows: Int32, slots: int, _: str) -> bytes:
    """A JSON array of one string."""
    return b'["' + base64.b64encode(_raw(rows, slots)) + b'"]'


def _base64_scores(answer: bytes) -> Float32:
    return _raw_scores(base64.b64decode(answer.strip(b'[]"')))


def _oip(rows: Int32, slots: int, model: str, *, lengths: tuple[int, ...] = ()) -> bytes:
    """An Open Inference Protocol `ModelInferRequest`; `lengths` are dimensions beside the batch's."""
    from inference.oip import open_inference_pb2 as messages

    request = messages.ModelInferRequest(model_name=model)
    for name, array in tensors(rows, slots).items():
        shape = (*array.shape, *lengths) if name == "lengths" else array.shape
        request.inputs.add(name=name, datatype="INT32", shape=shape)
        request.raw_input_contents.append(array.astype("<i4").tobytes())
    request.outputs.add(name="scores")
    return bytes(request.SerializeToString())


def _oip_scores(answer: bytes) -> Float32:
    from inference.oip import open_inference_pb2 as messages

    return _raw_scores(messages.ModelInferResponse.FromString(answer).raw_output_contents[0])


WIRES: Final[dict[str, Wire]] = {
    "raw": Wire(_raw, _raw_scores, "application/octet-stream"),
    "base64": Wire(_base64, _base64_scores, "application/json"),
    "oip": Wire(_oip, _oip_scores),
    "triton": Wire(partial(_oip, lengths=(1,)), _oip_scores),
}
