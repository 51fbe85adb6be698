"""LitServe: FastAPI before worker processes, through its fast queue (ZeroMQ)."""

# No `from __future__ import annotations`: LitServe reads the annotations as they stand.
from typing import Annotated, Any

import litserve
from fastapi import Body, Response

from infra.bench.serve.rivals.session import MAX_BATCH, PORT, WAIT_MS, WORKERS, Ranker


class Rank(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self._ranker = Ranker()

    def decode_request(self, request: Annotated[bytes, Body()]) -> bytes:
        return request

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def predict(self, bodies: Any) -> Any:
        return self._ranker.rank(bodies) if isinstance(bodies, list) else self._ranker.rank([bodies])[0]

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="application/octet-stream")


if __name__ == "__main__":
    api = Rank(max_batch_size=MAX_BATCH, batch_timeout=WAIT_MS / 1e3)
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=WORKERS, fast_queue=True, timeout=30
    )
    server.run(host="127.0.0.1", port=PORT, log_level="warning", generate_client_file=False)
