"""The requests, the same for every arm, and how each wire writes them."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from features.encoding import CANDIDATE_BEHAVIOR, GAP_ROWS, Vocabulary
from inference.types import Tensors
from infra.bench.serve.shape import CANDIDATES, COLUMNS, HISTORY, ROW

DIFFERENT: Final = 64
_SEED: Final = 5

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


class Known(NamedTuple):
    """How many items and categories have rows of their own: 1 to so many."""

    items: int
    categories: int

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> Known:
        return cls(len(vocabulary.item_ids), len(vocabulary.category_ids))


def requests(known: Known, lists: int) -> list[Int32]:
    """So many different requests [lists, ROW] of full histories, of known items and categories."""
    rng = np.random.default_rng(_SEED)
    shape = (DIFFERENT, lists)
    columns = [
        rng.integers(1, rows, (*shape, HISTORY))
        for rows in (known.items + 1, known.categories + 1, CANDIDATE_BEHAVIOR, GAP_ROWS)
    ]
    columns.append(np.full((*shape, 1), HISTORY))
    columns += [
        rng.integers(1, rows, (*shape, CANDIDATES)) for rows in (known.items + 1, known.categories + 1)
    ]
    return list(np.concatenate(columns, axis=2).astype(np.int32))


def tensors(rows: Int32) -> Tensors:
    """The inputs of the `rank` graph in rows [lists, ROW]."""
    inputs: Tensors = {
        name: np.ascontiguousarray(rows[:, place * HISTORY : (place + 1) * HISTORY])
        for place, name in enumerate(COLUMNS)
    }
    inputs["lengths"] = np.ascontiguousarray(rows[:, ROW - 2 * CANDIDATES - 1])
    inputs["candidates"] = np.ascontiguousarray(rows[:, ROW - 2 * CANDIDATES : -CANDIDATES])
    inputs["candidate_categories"] = np.ascontiguousarray(rows[:, -CANDIDATES:])
    return inputs


@dataclass(frozen=True, slots=True)
class Wire:
    """How a request [lists, ROW] for a model is written, and its scores [lists, CANDIDATES] are read.

    `content_type` is of HTTP, where the path names the model; empty is gRPC.
    """

    write: Callable[[Int32, str], bytes]
    read: Callable[[bytes], Float32]
    content_type: str = ""


def _raw(rows: Int32, _: str = "") -> bytes:
    return rows.astype("<i4").tobytes()


def _raw_scores(answer: bytes) -> Float32:
    return np.frombuffer(answer, "<f4").reshape(-1, CANDIDATES)


def _base64(rows: Int32, _: str) -> bytes:
    """A JSON array of one string."""
    return b'["' + base64.b64encode(_raw(rows)) + b'"]'


def _base64_scores(answer: bytes) -> Float32:
    return _raw_scores(base64.b64decode(answer.strip(b'[]"')))


def _oip(rows: Int32, model: str, *, lengths: tuple[int, ...] = ()) -> bytes:
    """An Open Inference Protocol `ModelInferRequest`; `lengths` are dimensions beside the batch's."""
    from inference.oip import open_inference_pb2 as messages

    request = messages.ModelInferRequest(model_name=model)
    for name, array in tensors(rows).items():
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
