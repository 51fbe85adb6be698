"""Ray Serve: its HTTP proxy before replicas that batch."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Ray's own switch for this: no per-request hops between event loops, quieter logs. Read at import.
os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from infra.bench.serve.rivals.session import MAX_BATCH, PORT, WAIT_MS, WORKERS, Ranker


@serve.deployment(num_replicas=WORKERS, max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0.5})
class Rank:
    def __init__(self) -> None:
        self._ranker = Ranker()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=WAIT_MS / 1e3)
    async def rank(self, bodies: list[bytes]) -> list[bytes]:
        return self._ranker.rank(bodies)

    async def __call__(self, request: Request) -> Response:
        return Response(await self.rank(await request.body()), media_type="application/octet-stream")


if __name__ == "__main__":
    quiet_here = {"include_dashboard": False, "logging_level": "warning", "log_to_driver": False}
    ray.init(_temp_dir=str(Path.cwd()), **quiet_here)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    quiet = {"enable_access_log": False, "log_level": "WARNING"}
    serve.run(Rank.bind(), route_prefix="/", logging_config=quiet)  # type: ignore[attr-defined]
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    ray.shutdown()
