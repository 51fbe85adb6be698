"""An asynchronous client of the Open Inference Protocol, numpy in and out.

>>> async with Client("127.0.0.1:8001") as client:
...     answer = await client.infer("tailrace-lists", inputs, ["items"], timeout_s=0.05)
...     answer["items"]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import grpc

from inference.oip import open_inference_pb2 as pb
from inference.oip import open_inference_pb2_grpc as pb_grpc
from inference.oip.messages import channel_of, error_of, request_of, tensors_of
from inference.types import Tensors


class Client:
    """One connection. Failed calls raise `InferenceError`, the same kind as the server had."""

    def __init__(
        self, url: str, *, timeout_s: float = 10.0, credentials: grpc.ChannelCredentials | None = None
    ) -> None:
        """`timeout_s` holds for every call that names no other. An address that begins with grpcs:// is
        called through TLS; `credentials` name an authority, or a certificate of the client's own."""
        self.url = url
        self._timeout_s = timeout_s
        self._channel = channel_of(url, blocking=False, credentials=credentials)
        self._stub = pb_grpc.GRPCInferenceServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def infer(
        self,
        model: str,
        inputs: Tensors,
        outputs: Sequence[str] = (),
        *,
        version: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Tensors:
        """The outputs named, all of them where none is. The deadline travels with the request: the
        server gives up what is late. Cancelling this gives it up as well."""
        request = request_of(model, version, inputs, outputs, priority=priority, timeout_s=timeout_s)
        return tensors_of(await self._call("ModelInfer", request, timeout_s))

    async def ready(self) -> bool:
        """Whether the server answers and has everything warmed."""
        answer = await self._call("ServerReady", pb.ServerReadyRequest())
        return bool(answer.ready)

    async def model_ready(self, model: str, version: str = "") -> bool:
        answer = await self._call("ModelReady", pb.ModelReadyRequest(name=model, version=version))
        return bool(answer.ready)

    async def models(self) -> list[tuple[str, str]]:
        """Name and version of what is served."""
        answer = await self._call("RepositoryIndex", pb.RepositoryIndexRequest(ready=True))
        return [(model.name, model.version) for model in answer.models]

    async def metadata(self, model: str, version: str = "") -> Any:
        """A ModelMetadataResponse."""
        return await self._call("ModelMetadata", pb.ModelMetadataRequest(name=model, version=version))

    async def _call(self, method: str, request: Any, timeout_s: float | None = None) -> Any:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            return await getattr(self._stub, method)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise error_of(error, self.url) from error
