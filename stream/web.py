"""/healthz, /readyz, /models and /metrics of a worker, over aiohttp.

Health is progress, not a listening port: a worker that holds or knows of records and has answered
none for `stall_ms` is not healthy, whatever its sockets say.
"""

from __future__ import annotations

from typing import Protocol

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest


class Worker(Protocol):
    """What the probes ask of a worker."""

    def health(self) -> dict[str, object]: ...
    async def readiness(self) -> dict[str, object]: ...
    def models(self) -> dict[str, object]: ...


async def serve(
    worker: Worker, registry: CollectorRegistry, host: str, port: int
) -> tuple[web.AppRunner, int]:
    """Listen; returns the runner (to clean up) and the port (chosen by the system where `port` is 0)."""

    async def healthz(_: web.Request) -> web.Response:
        body = worker.health()
        return web.json_response(body, status=200 if body["healthy"] else 503)

    async def readyz(_: web.Request) -> web.Response:
        body = await worker.readiness()
        return web.json_response(body, status=200 if body["ready"] else 503)

    async def models(_: web.Request) -> web.Response:
        return web.json_response(worker.models())

    async def metrics(_: web.Request) -> web.Response:
        text = generate_latest(registry) + generate_latest(REGISTRY)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application(client_max_size=64 * 1024)
    handlers = {"/healthz": healthz, "/readyz": readyz, "/models": models, "/metrics": metrics}
    app.add_routes([web.get(path, handler) for path, handler in handlers.items()])
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner, int(runner.addresses[0][1])
