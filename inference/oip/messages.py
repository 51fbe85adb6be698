"""Tensors ↔ protobuf messages on the client's side, and statuses ↔ our errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import grpc
import numpy as np

from inference.errors import (
    DeadlineExceeded,
    EngineFailed,
    InferenceError,
    InvalidRequest,
    ModelNotFound,
    ModelUnavailable,
    Overloaded,
)
from inference.http2.status import PUSHBACK
from inference.oip import open_inference_pb2 as pb
from inference.oip.models import DTYPES
from inference.types import Tensors

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_ERRORS: Final[dict[str, type[InferenceError]]] = {
    kind.grpc_status: kind
    for kind in (InvalidRequest, ModelNotFound, Overloaded, DeadlineExceeded, ModelUnavailable, EngineFailed)
}
MAX_MESSAGE_BYTES: Final = 64 * 2**20
_TLS: Final = "grpcs://"


def channel_of(url: str, *, blocking: bool, credentials: grpc.ChannelCredentials | None = None) -> Any:
    """A channel to host:port, through TLS with `credentials` or where the address begins with grpcs://.
    Connects when used."""
    options = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # One connection for each channel, so that what is slow or broken on one is not on another.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]
    library = grpc if blocking else grpc.aio
    if url.startswith(_TLS) or credentials is not None:
        credentials = credentials or grpc.ssl_channel_credentials()
        return library.secure_channel(url.removeprefix(_TLS), credentials, options)
    return library.insecure_channel(url, options)


def request_of(
    model: str,
    version: str,
    inputs: Tensors,
    outputs: Sequence[str] = (),
    *,
    priority: int = 0,
    timeout_s: float | None = None,
) -> Any:
    """A ModelInferRequest with raw contents. Types are taken from the arrays."""
    request = pb.ModelInferRequest(model_name=model, model_version=version)
    for name, array in inputs.items():
        datatype = _NAMES.get(array.dtype.newbyteorder("<"))
        if datatype is None:
            raise InvalidRequest(
                f"input {name} is {array.dtype}; the protocol's types here are {', '.join(DTYPES)}"
            )
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(np.asarray(array, DTYPES[datatype]).tobytes())
    for name in outputs:
        request.outputs.add(name=name)
    if priority:
        request.parameters["priority"].uint64_param = priority
    if timeout_s is not None:
        # Rounded up: a timeout of 0 would be none.
        request.parameters["timeout"].int64_param = max(1, math.ceil(timeout_s * 1e6))
    return request


def tensors_of(response: Any) -> Tensors:
    """The outputs of a ModelInferResponse, the caller's own; `EngineFailed` where it contradicts itself."""
    raw = response.raw_output_contents
    if len(raw) != len(response.outputs):
        raise EngineFailed(f"{len(response.outputs)} outputs came with {len(raw)} raw contents")
    tensors: Tensors = {}
    for output, content in zip(response.outputs, raw, strict=True):
        dtype = DTYPES.get(output.datatype)
        if dtype is None:
            raise EngineFailed(f"output {output.name} came as {output.datatype}")
        if min(output.shape, default=1) < 0 or len(content) != math.prod(output.shape) * dtype.itemsize:
            raise EngineFailed(f"output {output.name} came as {len(content)} bytes for {list(output.shape)}")
        tensors[output.name] = np.frombuffer(content, dtype).reshape(output.shape).copy()
    return tensors


def error_of(error: grpc.RpcError, url: str) -> InferenceError:
    """Our error for a failed call, with the server's word on when to come again."""
    code = error.code().name
    told = dict(error.trailing_metadata() or ()).get(PUSHBACK, "")
    after_s = int(told) / 1e3 if str(told).isdecimal() else None
    return _ERRORS.get(code, EngineFailed)(f"{url}: {error.details() or code}", retry_after_s=after_s)
