"""The REST front, on aiohttp: JSON tensors, and Triton's binary ones.

A binary request is a JSON object, whose length the header Inference-Header-Content-Length tells, and
after it the bytes of the tensors that have a `binary_data_size`, in order.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import version as package_version
from typing import Any, Final

import numpy as np
import orjson
from aiohttp import web

from inference.errors import InferenceError, InvalidRequest
from inference.oip.models import Answer, ServedModel, TensorSpec
from inference.oip.service import EXTENSIONS, NAME, Call, Service, refuse_unserved
from inference.oip.settings import ServeSettings
from inference.oip.tensors import Given

log = logging.getLogger(__name__)

STATUS: Final[dict[str, int]] = {
    "INVALID_ARGUMENT": 400,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
HEADER_LENGTH: Final = "Inference-Header-Content-Length"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(service: Service, settings: ServeSettings) -> web.Application:
    """The application; whoever runs it listens."""
    rest = Rest(service, settings)
    app = web.Application(middlewares=[sentences])
    app.add_routes(
        [
            web.get("/v2/health/live", rest.live),
            web.get("/v2/health/ready", rest.ready),
            web.get("/v2", rest.server),
            web.post("/v2/repository/index", rest.index),
        ]
    )
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        app.add_routes(
            [
                web.get(model, rest.model),
                web.get(f"{model}/ready", rest.model_ready),
                web.post(f"{model}/infer", rest.infer),
            ]
        )
    return app


@web.middleware
async def sentences(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever goes wrong is a status and {"error": sentence}."""
    try:
        return await handler(request)
    except InferenceError as error:
        return _json({"error": str(error)}, STATUS[error.grpc_status], _retry(error.retry_after_s))
    except web.HTTPException as error:
        retry = _retry(1.0 if error.status in (429, 503) else None)
        return _json({"error": error.text or error.reason}, error.status, retry)
    except Exception:
        log.exception("%s %s failed", request.method, request.raw_path)
        return _json({"error": "the server failed; its log says how"}, 500)


class Rest:
    """Handlers of the protocol's paths."""

    def __init__(self, service: Service, settings: ServeSettings) -> None:
        self._service = service
        self._catalogue = service.catalogue
        self._settings = settings
        self._reading = self._coming = 0  # bodies being read, and their bytes so far

    async def live(self, request: web.Request) -> web.Response:
        return _json({"live": True})

    async def ready(self, request: web.Request) -> web.Response:
        return _json({"ready": self._service.ready}, 200 if self._service.ready else 503)

    async def server(self, request: web.Request) -> web.Response:
        return _json({"name": NAME, "version": package_version(NAME), "extensions": EXTENSIONS})

    async def index(self, request: web.Request) -> web.Response:
        models = self._catalogue.all()
        return _json([{"name": model.name, "version": model.version, "state": "READY"} for model in models])

    async def model(self, request: web.Request) -> web.Response:
        model = self._find(request)
        return _json(
            {
                "name": model.name,
                "versions": self._catalogue.versions_of(model.name),
                "platform": model.platform,
                "inputs": [_metadata(spec) for spec in model.inputs],
                "outputs": [_metadata(spec) for spec in model.outputs],
            }
        )

    async def model_ready(self, request: web.Request) -> web.Response:
        model = self._find(request)
        ready = self._service.ready
        return _json({"name": model.name, "ready": ready}, 200 if ready else 503)

    async def infer(self, request: web.Request) -> web.Response:
        body, tail = await self._read(request)
        call = _call(request.match_info, body, tail)
        model, answer = await self._service.infer(call)
        return _answer(model, answer, body)

    def _find(self, request: web.Request) -> ServedModel:
        return self._catalogue.find(request.match_info["model"], request.match_info.get("version", ""))

    async def _read(self, request: web.Request) -> tuple[dict[str, Any], memoryview]:
        """The JSON object, and the bytes after it. Bodies being read count against the limit too."""
        if self._reading >= self._service.max_requests:
            raise web.HTTPTooManyRequests(text=f"{self._reading} requests are being read already")
        self._reading += 1
        content = bytearray()
        try:
            async with asyncio.timeout(self._settings.read_timeout_ms / 1e3):
                async for part in request.content.iter_any():
                    content += part
                    self._coming += len(part)
                    self._check_room(len(content))
        except TimeoutError:
            raise web.HTTPRequestTimeout(text="the body did not come in time") from None
        finally:
            self._reading -= 1
            self._coming -= len(content)
        size = _header_length(request, len(content))
        if size > self._settings.max_json_bytes:
            most = self._settings.max_json_bytes
            raise web.HTTPRequestEntityTooLarge(
                most, size, text=f"{size} bytes of JSON are more than {most}; send tensors as binary data"
            )
        try:
            body = orjson.loads(content[:size])
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(f"the body is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise InvalidRequest("the body is a JSON object, nothing else")
        return body, memoryview(content)[size:]

    def _check_room(self, size: int) -> None:
        """For a body of so many bytes so far, and for those of all others."""
        most = self._settings.max_message_bytes
        if size > most:
            raise web.HTTPRequestEntityTooLarge(most, size)
        if self._coming > self._settings.max_unfinished_bytes:
            raise web.HTTPTooManyRequests(text="too many bytes are held of requests that are not whole")


def _header_length(request: web.Request, total: int) -> int:
    told = request.headers.get(HEADER_LENGTH)
    if told is None:
        return total
    if not (told.isascii() and told.isdigit()) or len(told) > 12 or int(told) > total:
        raise InvalidRequest(f"{HEADER_LENGTH} is {told[:32]!r}, and the body has {total} bytes")
    return int(told)


def _call(path: Mapping[str, str], body: dict[str, Any], tail: memoryview) -> Call:
    parameters = _parameters(body)
    inputs: list[Given] = []
    for tensor in _objects(body, "inputs"):
        given, tail = _given(tensor, tail)
        inputs.append(given)
    if len(tail):
        raise InvalidRequest(f"{len(tail)} bytes follow the last tensor")
    outputs = []
    for output in _objects(body, "outputs"):
        _parameters(output)
        outputs.append(_text(output, "name"))
    return Call(
        model=path["model"],
        version=path.get("version", ""),
        inputs=inputs,
        outputs=outputs,
        parameters=parameters,
    )


def _given(tensor: dict[str, Any], tail: memoryview) -> tuple[Given, memoryview]:
    """A tensor, and the bytes that are left for those after it."""
    name, datatype = _text(tensor, "name"), _text(tensor, "datatype")
    shape = tensor.get("shape")
    if not isinstance(shape, list) or any(type(size) is not int for size in shape):
        raise InvalidRequest(f"input {name[:64]!r} needs a shape of integers")
    size = _parameters(tensor).get("binary_data_size")
    if size is None:
        return Given(name, datatype, shape, _numbers(name, tensor.get("data"))), tail
    if type(size) is not int or not 0 <= size <= len(tail):
        raise InvalidRequest(f"input {name[:64]!r}: {len(tail)} bytes are left for its binary_data_size")
    if "data" in tensor:
        raise InvalidRequest(f"input {name[:64]!r} has data in JSON and in binary")
    return Given(name, datatype, shape, tail[:size]), tail[size:]


def _numbers(name: str, data: Any) -> Any:
    """Flat or nested lists of numbers as one flat array."""
    try:
        if isinstance(data, list):
            return np.array(data).reshape(-1)
    except (ValueError, OverflowError):
        pass
    raise InvalidRequest(f"input {name[:64]!r} needs data: numbers, flat or in rows of equal length")


def _objects(body: dict[str, Any], name: str) -> list[dict[str, Any]]:
    objects = body.get(name, [])
    if not isinstance(objects, list) or not all(isinstance(value, dict) for value in objects):
        raise InvalidRequest(f"{name} is a list of objects")
    return objects


def _text(tensor: dict[str, Any], name: str) -> str:
    value = tensor.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"every tensor has a {name}, which is a string")
    return value


def _parameters(owner: dict[str, Any]) -> dict[str, Any]:
    parameters = owner.get("parameters", {})
    if not isinstance(parameters, dict):
        raise InvalidRequest("parameters are an object")
    refuse_unserved(parameters)
    return parameters


def _answer(model: ServedModel, answer: Answer, body: dict[str, Any]) -> web.Response:
    binary = bool(_parameters(body).get("binary_data_output"))
    wishes = {
        output["name"]: bool(_parameters(output).get("binary_data", binary))
        for output in _objects(body, "outputs")
    }
    datatypes = {spec.name: spec.datatype for spec in model.outputs}
    described, tail = [], []
    for name, array in answer.outputs.items():
        tensor: dict[str, Any] = {"name": name, "datatype": datatypes[name], "shape": list(array.shape)}
        if wishes.get(name, binary):
            tensor["parameters"] = {"binary_data_size": array.nbytes}
            tail.append(array.tobytes())
        else:
            tensor["data"] = array.reshape(-1)
        described.append(tensor)
    told = {"model_name": model.name, "model_version": answer.version, "outputs": described}
    if isinstance(body.get("id"), str):
        told["id"] = body["id"]
    if not tail:
        return _json(told)
    header = orjson.dumps(told, option=orjson.OPT_SERIALIZE_NUMPY)
    return web.Response(
        body=b"".join((header, *tail)),
        content_type="application/octet-stream",
        headers={HEADER_LENGTH: str(len(header))},
    )


def _metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}


def _retry(after_s: float | None) -> dict[str, str]:
    """HTTP counts in whole seconds."""
    return {} if after_s is None else {"Retry-After": str(max(1, math.ceil(after_s)))}


def _json(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    content = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    return web.Response(body=content, status=status, headers=headers, content_type="application/json")
