"""`tailrace serve`: the inference server."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time
from pathlib import Path

import click

from infra.commands import options, settings
from infra.commands.again import again
from infra.console import log_to_stderr
from infra.local.server import is_free
from infra.supervise import supervise

_PORT = click.IntRange(0, 65535)


@click.command()
@options.registry
@click.option("--version", "version", default="serving", show_default=True, help="A version, or an alias.")
@click.option("--host", envvar="SERVE_HOST", default="127.0.0.1", show_default=True)
@click.option("--grpc-port", envvar="SERVE_GRPC_PORT", type=_PORT, default=8001, show_default=True)
@click.option("--http-port", envvar="SERVE_HTTP_PORT", type=_PORT, default=8000, show_default=True)
@click.option("--admin-host", envvar="SERVE_ADMIN_HOST", default="127.0.0.1", show_default=True)
@click.option(
    "--admin-port",
    envvar="SERVE_ADMIN_PORT",
    type=_PORT,
    default=8002,
    show_default=True,
    help="Load, unload, metrics; beyond loopback only with a token in TAILRACE_ADMIN_TOKEN.",
)
@options.engine
@options.workers(
    "Processes on the same ports, connections for the one with fewest; each has an admin port of its "
    "own, the next ones from --admin-port."
)
@click.option(
    "--redis-url",
    envvar="SERVE_REDIS_URL",
    show_envvar=True,
    default="",
    callback=options.redis_address,
    help="Where the workers keep what is popular and who is in which tier; rates are shared there.",
    show_default="none",
)
@options.log_level
def serve(
    *,
    registry: Path,
    version: str,
    host: str,
    grpc_port: int,
    http_port: int,
    admin_host: str,
    admin_port: int,
    engine: str,
    workers: int,
    redis_url: str,
    log_level: str,
) -> None:
    """Released models over the Open Inference Protocol v2, gRPC and REST, until SIGTERM or Ctrl-C.

    A port of 0 is one that the system chooses. Models are tailrace-lists (histories in, ranked lists
    out) and the graphs tailrace-encode, tailrace-score and tailrace-rank; their versions are those of
    the registry. What --version names is followed: when the alias moves (`tailrace models promote`,
    canary, shadow, rollback) the new version is loaded, verified, warmed and asked recent lists beside
    the old one, and then serves. On SIGTERM the server is not ready any more, and finishes what is in
    hand, for SERVE_DRAIN_TIMEOUT_MS (10 s) at most. Limits are set by SERVE_*, engines by INFERENCE_*.

    ADMISSION_* says who is let in, as for the worker: tiers (`tailrace tiers`) are looked up in Redis by
    the user_ids of a request. Whose rate is used up is answered 429 (RESOURCE_EXHAUSTED), whom there is
    no room for 503 (UNAVAILABLE); both say when to come again.

    SERVE_TLS_CERTIFICATE and SERVE_TLS_KEY name PEM files: gRPC and REST then speak TLS. With
    SERVE_TLS_CLIENT_CA clients need a certificate of that authority.

    \b
    tailrace serve
    tailrace serve --engine openvino --grpc-port 9001
    tailrace serve --workers 4
    INFERENCE_LANES='onnx*2; openvino' tailrace serve --redis-url redis://localhost:6379/0
    curl localhost:8000/v2/models/tailrace-lists
    curl -H 'Content-Type: application/json' -d '{"version": "20260101T000000-a"}' localhost:8002/load
    """
    from features.settings import FeatureSettings
    from inference.admission.settings import AdmissionSettings
    from inference.oip.dealt import GRPC, HTTP
    from inference.oip.settings import ServeSettings
    from inference.settings import InferenceSettings
    from infra.dealing import Dealer

    started_s = time.perf_counter()
    log_to_stderr(log_level, "faiss")
    told = settings.read(
        ServeSettings,
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        admin_host=admin_host,
        admin_port=admin_port,
    )
    features = settings.read(FeatureSettings)
    admission = settings.read(AdmissionSettings)
    inference = settings.read(InferenceSettings, engine=engine)
    if workers > 1:
        taken = [port for port in range(admin_port, admin_port + workers) if not is_free(port)]
        if 0 in (grpc_port, http_port, admin_port) or taken:
            why = f"{taken[0]} is taken" if taken else "0 would be another one for each"
            raise click.ClickException(f"several processes need ports of their own: {why}")
        try:
            dealer = Dealer({GRPC: (host, grpc_port), HTTP: (host, http_port)}, workers)
        except OSError as error:
            raise click.ClickException(str(error)) from error
        # Not on the command line: others may read that, and the address may hold a password.
        os.environ["SERVE_REDIS_URL"] = redis_url
        command = again("workers", "redis_url", "admin_port")
        commands = [[*command, "--admin-port", str(admin_port + number)] for number in range(workers)]
        raise SystemExit(supervise(commands, dealer))
    try:
        import grpc  # noqa: F401  # named here, so that its absence is a sentence
    except ModuleNotFoundError as error:
        raise click.ClickException("the server needs gRPC: pip install 'tailrace[serve]'") from error

    import uvloop

    from features.memory_store import MemoryStore
    from features.redis_store import RedisStore
    from features.statistics import ItemStatistics
    from inference.errors import ModelUnavailable
    from inference.oip.admin import TOKEN_VARIABLE, AdminRefused
    from inference.oip.server import InferenceServer
    from inference.oip.tls import TlsInvalid

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        store = RedisStore(redis_url, settings=features) if redis_url else MemoryStore()
        server = InferenceServer(
            registry,
            ItemStatistics(store, settings=features),
            serve=told,
            inference=inference,
            features=features,
            token=os.environ.get(TOKEN_VARIABLE, ""),
            alias=version,
            admission=admission,
            tiers=store if isinstance(store, RedisStore) else None,
            redis_url=redis_url or None,
            alone=stop.set,
        )
        try:
            # One of several processes is not given connections before it can serve them.
            ports = None if told.dealt_fd is not None else await server.start()
            loading = asyncio.create_task(server.load())
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                loading.cancel()
                return
            await loading
            ports = ports or await server.start()
            # What was loaded stays: collections need not look at it.
            gc.collect()
            gc.freeze()
            serving = server.catalogue.serving
            click.echo(
                f"serving {serving} on gRPC {host}:{ports.grpc}, HTTP {host}:{ports.http}, "
                f"admin {admin_host}:{ports.admin}; cold start {time.perf_counter() - started_s:.1f} s"
            )
            await stop.wait()
            click.echo(f"draining {server.service.requests} requests")
        finally:
            drained = await server.close()
            if isinstance(store, RedisStore):
                await store.close()
        click.echo("all were answered" if drained else "some were given up")

    # As in the stream's worker: rare collections, and a quick hand-over between loop and lanes.
    gc.set_threshold(20_000, 50, 100)
    sys.setswitchinterval(0.0005)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run())
    except (AdminRefused, ModelUnavailable, OSError, TlsInvalid) as error:
        raise click.ClickException(str(error)) from error
