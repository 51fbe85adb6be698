"""The gRPC front: messages ↔ `service`, errors ↔ statuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version as package_version
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import SERVICE_NAME, ReflectionServicer

from inference.errors import InvalidRequest, ModelNotFound
from inference.http2.heads import Deferred, Immediate, Streaming
from inference.http2.limits import Limits
from inference.http2.server import Server
from inference.oip import open_inference_pb2 as pb
from inference.oip.forms import Forms, serialise
from inference.oip.listening import HANDSHAKE_S
from inference.oip.models import DTYPES, Datatype, TensorSpec
from inference.oip.service import EXTENSIONS, NAME, Call, Service, refuse_unserved
from inference.oip.settings import ServeSettings
from inference.oip.tensors import Given

_REFLECTION: Final = f"/{SERVICE_NAME}/ServerReflectionInfo"
_SERVICE: Final = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
# Where the numbers of a tensor are when they are not raw.
_CONTENTS: Final[dict[Datatype, str]] = {
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
}
_HEALTH_ROOM: Final = 64  # calls beyond the limit of inference: probes are answered under load
_INFER: Final = "ModelInfer"


def make_server(service: Service, settings: ServeSettings) -> Server:
    """Not started."""
    servicer = OpenInference(service)
    methods = {
        f"/{_SERVICE.full_name}/{method.name}": _method(servicer, method) for method in _SERVICE.methods
    }
    told = ReflectionServicer([_SERVICE.full_name, SERVICE_NAME])
    return Server(methods | {_REFLECTION: Streaming(partial(_reflect, told))}, _limits(settings))


def _limits(settings: ServeSettings) -> Limits:
    return Limits(
        max_message_bytes=settings.max_message_bytes,
        max_unfinished_bytes=settings.max_unfinished_bytes,
        max_calls=settings.max_requests + _HEALTH_ROOM,
        max_connections=settings.max_connections,
        max_streams=settings.max_streams,
        handshake_s=HANDSHAKE_S,
        idle_s=settings.idle_timeout_ms / 1e3,
        keepalive_s=settings.keepalive_ms / 1e3,
        keepalive_timeout_s=settings.keepalive_timeout_ms / 1e3,
        stall_s=settings.stall_timeout_ms / 1e3,
        min_ping_interval_s=settings.min_ping_interval_ms / 1e3,
    )


def _method(servicer: OpenInference, method: Any) -> Deferred | Immediate:
    """Bytes to bytes. Raises `InferenceError`; bytes that are no message, too, become one."""
    if method.name == _INFER:
        return Deferred(servicer.infer)
    serve = getattr(servicer, method.name)
    kind = getattr(pb, method.input_type.name)

    def answer(content: bytes) -> bytes:
        return bytes(serve(_parsed(kind, content)).SerializeToString())

    return Immediate(answer)


def _parsed(kind: Any, content: bytes) -> Any:
    try:
        return kind.FromString(content)
    except DecodeError:
        raise InvalidRequest(f"the bytes are no {kind.DESCRIPTOR.name}") from None


def _reflect(servicer: Any, content: bytes) -> Iterator[bytes]:
    request = _parsed(reflection_pb2.ServerReflectionRequest, content)
    for answer in servicer.ServerReflectionInfo([request], None):
        yield answer.SerializeToString()


class OpenInference:
    """The protocol's methods. What we do not serve answers UNIMPLEMENTED, as gRPC has it."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._catalogue = service.catalogue
        self._forms = Forms()

    def ServerLive(self, request: Any) -> Any:  # noqa: N802
        return pb.ServerLiveResponse(live=True)

    def ServerReady(self, request: Any) -> Any:  # noqa: N802
        return pb.ServerReadyResponse(ready=self._service.ready)

    def ModelReady(self, request: Any) -> Any:  # noqa: N802
        try:
            self._catalogue.find(request.name, request.version)
        except ModelNotFound:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._service.ready)

    def ServerMetadata(self, request: Any) -> Any:  # noqa: N802
        return pb.ServerMetadataResponse(name=NAME, version=package_version(NAME), extensions=EXTENSIONS)

    def ModelMetadata(self, request: Any) -> Any:  # noqa: N802
        model = self._catalogue.find(request.name, request.version)
        return pb.ModelMetadataResponse(
            name=model.name,
            versions=self._catalogue.versions_of(model.name),
            platform=model.platform,
            inputs=map(_metadata, model.inputs),
            outputs=map(_metadata, model.outputs),
        )

    def RepositoryIndex(self, request: Any) -> Any:  # noqa: N802
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(name=model.name, version=model.version, state="READY")
                for model in self._catalogue.all()
            ]
        )

    async def infer(self, message: bytes, remaining_s: float | None) -> bytes:
        """`ModelInfer`, from message to message; the client's deadline leaves so long. Raises
        `InferenceError`."""
        form = self._forms.find(message)
        if form is not None and self._service.ready:
            call = form.call
            tensors = form.tensors(message)
            if tensors is not None and self._catalogue.find(call.model, call.version) is form.model():
                call = replace(call, checked=tensors, remaining_s=remaining_s)
                model, answered = await self._service.infer(call)
                return serialise(form, call.id, model, answered)
        request = _parsed(pb.ModelInferRequest, message)
        call = _call(request, remaining_s)
        model, answered = await self._service.infer(call)
        self._forms.learn(message, request, replace(call, inputs=()), model)
        return serialise(None, request.id, model, answered)


def _metadata(spec: TensorSpec) -> Any:
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=spec.shape)


def _call(request: Any, remaining_s: float | None) -> Call:
    for parameters in (request.parameters, *(tensor.parameters for tensor in request.inputs)):
        refuse_unserved(parameters)
    for output in request.outputs:
        refuse_unserved(output.parameters)
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(f"{len(request.inputs)} inputs come with {len(raw)} raw contents")
    inputs = []
    for place, tensor in enumerate(request.inputs):
        if raw and tensor.HasField("contents"):
            raise InvalidRequest(f"input {tensor.name[:64]!r} has raw contents and others")
        data = raw[place] if raw else _typed(tensor)
        inputs.append(Given(tensor.name, tensor.datatype, tensor.shape, data))
    return Call(
        model=request.model_name,
        version=request.model_version,
        inputs=inputs,
        outputs=[output.name for output in request.outputs],
        parameters={name: _parameter(value) for name, value in request.parameters.items()},
        remaining_s=remaining_s,
        id=request.id,
    )


def _typed(tensor: Any) -> Any:
    """The numbers of the field that goes with the tensor's type; none where that is another type's."""
    contents = _CONTENTS.get(tensor.datatype)
    if contents is None:
        return b""  # the type is refused by name
    return np.array(getattr(tensor.contents, contents), DTYPES[tensor.datatype])


def _parameter(value: Any) -> Any:
    choice = value.WhichOneof("parameter_choice")
    return None if choice is None else getattr(value, choice)
