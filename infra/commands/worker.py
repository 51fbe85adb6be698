"""`tailrace worker`: the service itself."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import click

from infra.commands import options, settings
from infra.commands.again import again
from infra.commands.probes import check_listens
from infra.console import log_to_stderr
from infra.supervise import supervise


@click.command()
@options.bootstrap
@options.redis_url
@options.registry
@click.option("--group", envvar="STREAM_GROUP", default="tailrace", show_default=True, help="Consumer group.")
@click.option(
    "--instance-id",
    envvar="STREAM_INSTANCE_ID",
    default=socket.gethostname,
    show_default="host name",
    help="Static group membership: one live worker per id; the same id comes back without a rebalance.",
)
@options.topic_suffix
@options.workers("Processes to run.")
@click.option("--http-host", envvar="STREAM_HTTP_HOST", default="127.0.0.1", show_default=True)
@click.option(
    "--http-port",
    envvar="STREAM_HTTP_PORT",
    type=click.IntRange(0, 65535),
    default=6066,
    show_default=True,
    help="/healthz, /readyz, /metrics; 0 takes a free port; with --workers the next ones too.",
)
@click.option(
    "--trigger",
    envvar="STREAM_TRIGGER",
    type=click.Choice(["click", "user"]),
    default="click",
    show_default=True,
    help="A list for every click, or one for all clicks of a user that are in hand together.",
)
@click.option(
    "--k",
    envvar="STREAM_K",
    type=click.IntRange(1, 1000),
    default=10,
    show_default=True,
    help="Length of a list; at most FEATURES_CANDIDATE_LIMIT (50) are ranked.",
)
@options.engine
@options.log_level
def worker(
    *,
    bootstrap: str,
    redis_url: str,
    registry: Path,
    group: str,
    instance_id: str,
    topic_suffix: str,
    workers: int,
    http_host: str,
    http_port: int,
    trigger: str,
    k: int,
    engine: str,
    log_level: str,
) -> None:
    """Clicks and requests in, ranked lists out, until SIGTERM or Ctrl-C; then drain and leave.

    Work in hand is given STREAM_DRAIN_TIMEOUT_MS (10 s) and closing STREAM_CLOSE_TIMEOUT_MS (10 s)
    more. A worker that has not ended by then, because a broker that is gone holds it, logs what is
    left and ends hard with exit code 75; the next owner of its partitions reads that again.

    Everything else is set by STREAM_*, FEATURES_*, INFERENCE_* and ADMISSION_* in the environment.

    \b
    tailrace worker
    tailrace worker --workers 2 --engine onnx
    STREAM_DRAIN_TIMEOUT_MS=5000 tailrace worker --instance-id $POD_NAME
    """
    from features.settings import FeatureSettings
    from inference.admission.settings import AdmissionSettings
    from inference.settings import InferenceSettings
    from stream.settings import StreamSettings
    from stream.worker import run
    from topics.admin import topic_epochs

    log_to_stderr(log_level, "aiokafka", "faust", "mode", "kafka", "httpx", "faiss")
    stream = settings.read(
        StreamSettings,
        bootstrap=bootstrap,
        redis_url=redis_url,
        registry=str(registry),
        group=group,
        instance_id=instance_id,
        topic_suffix=topic_suffix,
        http_host=http_host,
        http_port=http_port,
        trigger=trigger,
        k=k,
    )
    features = settings.read(FeatureSettings)
    admission = settings.read(AdmissionSettings)
    inference = settings.read(InferenceSettings, engine=engine)
    ports = range(http_port, http_port + workers) if http_port else ()
    for port in ports:
        check_listens(http_host, port)
    # A broker or a topic that is not there is a sentence now, before anything is started.
    topic_epochs(bootstrap, stream.topics)
    if workers > 1:
        # Not on the command line: others may read that, and the address may hold a password.
        os.environ["TAILRACE_REDIS_URL"] = redis_url
        command = again("workers", "redis_url", "instance_id", "http_port")
        own = [(f"{instance_id}-{number}", ports[number] if ports else 0) for number in range(workers)]
        raise SystemExit(
            supervise([[*command, "--instance-id", name, "--http-port", str(port)] for name, port in own])
        )
    run(stream, features, inference, admission, log_level=log_level)
