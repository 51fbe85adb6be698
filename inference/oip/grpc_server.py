"""The gRPC front: messages ↔ `service`, errors ↔ statuses."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.metadata import version as package_version
from typing import Any, Final

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from grpc_reflection.v1alpha import reflection

from inference.errors import InferenceError, InvalidRequest, ModelNotFound
from inference.oip import open_inference_pb2 as pb
from inference.oip.forms import Forms, serialise
from inference.oip.messages import PUSHBACK
from inference.oip.models import DTYPES, Datatype, TensorSpec
from inference.oip.service import EXTENSIONS, NAME, Call, Service, refuse_unserved
from inference.oip.settings import ServeSettings
from inference.oip.tensors import Given
from inference.oip.tls import Tls

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
# Where the numbers of a tensor are when they are not raw.
_CONTENTS: Final[dict[Datatype, str]] = {
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
}
_HEALTH_ROOM: Final = 64  # RPCs beyond the limit of inference: probes are answered under load


def make_server(service: Service, settings: ServeSettings) -> grpc.aio.Server:
    """Not started, and bound to no port yet."""
    limits = {
        "grpc.max_receive_message_length": settings.max_message_bytes,
        "grpc.max_send_message_length": settings.max_message_bytes,
        "grpc.max_concurrent_streams": settings.max_streams,
        "grpc.max_metadata_size": 16 * 1024,
        # A client that pings more often than this is told to go away.
        "grpc.http2.min_ping_interval_without_data_ms": settings.min_ping_interval_ms,
        "grpc.http2.min_recv_ping_interval_without_data_ms": settings.min_ping_interval_ms,
        "grpc.http2.max_ping_strikes": 2,
        "grpc.keepalive_permit_without_calls": 0,
        # And one that has gone without a word is noticed.
        "grpc.keepalive_time_ms": settings.keepalive_ms,
        "grpc.keepalive_timeout_ms": settings.keepalive_timeout_ms,
        "grpc.max_connection_idle_ms": settings.idle_timeout_ms,
        "grpc.max_allowed_incoming_connections": settings.max_connections,
        "grpc.server_handshake_timeout_ms": 10_000,
        "grpc.so_reuseport": int(settings.reuse_port),
    }
    server = grpc.aio.server(
        options=list(limits.items()), maximum_concurrent_rpcs=settings.max_requests + _HEALTH_ROOM
    )
    servicer = OpenInference(service)
    methods = {method.name: _handler(servicer, method) for method in _SERVICE.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE.full_name, methods),))
    reflection.enable_server_reflection([_SERVICE.full_name, reflection.SERVICE_NAME], server)
    return server


def credentials(tls: Tls) -> grpc.ServerCredentials:
    """For `add_secure_port`. Where there is an authority, clients need a certificate of its."""
    return grpc.ssl_server_credentials(
        [(tls.key, tls.certificate)], tls.client_ca, require_client_auth=tls.client_ca is not None
    )


def _handler(servicer: OpenInference, method: Any) -> Any:
    """Bytes that are no message, and every `InferenceError`, become a status with a sentence."""
    if method.name == "ModelInfer":
        return grpc.unary_unary_rpc_method_handler(servicer.infer)  # bytes to bytes
    serve = getattr(servicer, method.name)
    kind = getattr(pb, method.input_type.name)

    def parse(content: bytes) -> Any:
        try:
            return kind.FromString(content)
        except DecodeError:
            return None

    async def handle(request: Any, context: Any) -> Any:
        try:
            if request is None:
                raise InvalidRequest(f"the bytes are no {method.input_type.name}")
            return await serve(request, context)
        except InferenceError as error:
            return await _abort(context, error)

    return grpc.unary_unary_rpc_method_handler(
        handle,
        request_deserializer=parse,
        response_serializer=getattr(pb, method.output_type.name).SerializeToString,
    )


async def _abort(context: Any, error: InferenceError) -> Any:
    # gRPC's own hint: a client with a retry policy waits as long.
    after_s = error.retry_after_s
    hint = () if after_s is None else ((PUSHBACK, str(math.ceil(1e3 * after_s))),)
    return await context.abort(grpc.StatusCode[error.grpc_status], str(error), hint)


class OpenInference:
    """The protocol's methods. What we do not serve answers UNIMPLEMENTED, as gRPC has it."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._catalogue = service.catalogue
        self._forms = Forms()

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.ServerReadyResponse(ready=self._service.ready)

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            self._catalogue.find(request.name, request.version)
        except ModelNotFound:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._service.ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.ServerMetadataResponse(name=NAME, version=package_version(NAME), extensions=EXTENSIONS)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        model = self._catalogue.find(request.name, request.version)
        return pb.ModelMetadataResponse(
            name=model.name,
            versions=self._catalogue.versions_of(model.name),
            platform=model.platform,
            inputs=map(_metadata, model.inputs),
            outputs=map(_metadata, model.outputs),
        )

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(name=model.name, version=model.version, state="READY")
                for model in self._catalogue.all()
            ]
        )

    async def infer(self, message: bytes, context: Any) -> bytes:
        """`ModelInfer`, from message to message."""
        try:
            return await self._infer(message, context)
        except InferenceError as error:
            await _abort(context, error)
            raise  # not reached: aborting raises

    async def _infer(self, message: bytes, context: Any) -> bytes:
        form = self._forms.find(message)
        if form is not None and self._service.ready:
            call = form.call
            tensors = form.tensors(message)
            if tensors is not None and self._catalogue.find(call.model, call.version) is form.model():
                call = replace(call, checked=tensors, remaining_s=context.time_remaining())
                model, answered = await self._service.infer(call)
                return serialise(form, call.id, model, answered)
        try:
            request = pb.ModelInferRequest.FromString(message)
        except DecodeError:
            raise InvalidRequest("the bytes are no ModelInferRequest") from None
        call = _call(request, context.time_remaining())
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
