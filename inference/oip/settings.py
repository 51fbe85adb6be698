"""SERVE_* in the environment: where the server listens, and its limits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

Port = Annotated[int, Field(ge=0, le=65535)]


class ServeSettings(BaseSettings):
    """A port of 0 is one that the system chooses."""

    model_config = SettingsConfigDict(env_prefix="SERVE_", frozen=True)

    host: str = "127.0.0.1"
    grpc_port: Port = 8001
    http_port: Port = 8000
    admin_host: str = "127.0.0.1"
    admin_port: Port = 8002

    dealt_fd: Annotated[int, Field(ge=0)] | None = None
    """A Unix socket over which connections come from the process that listens, which sets this:
    `tailrace serve --workers`."""

    tls_certificate: Path | None = None
    tls_key: Path | None = None
    """PEM files, the certificate with those between it and its authority: both fronts speak TLS then, and
    so does the admin listener beyond loopback. They are read once, at the start."""
    tls_client_ca: Path | None = None
    """Clients need a certificate of this authority (mutual TLS)."""

    max_message_bytes: Annotated[int, Field(ge=1024, le=2**30)] = 64 * 2**20
    max_json_bytes: Annotated[int, Field(ge=1024, le=2**30)] = 4 * 2**20
    """The JSON part of a REST request: its numbers are parsed on the event loop."""

    max_unfinished_bytes: Annotated[int, Field(ge=1024, le=2**40)] = 512 * 2**20
    """Of requests that are still coming in, of all clients of a front; who brings more is refused."""

    max_requests: Annotated[int, Field(ge=1, le=65_536, description="in hand at once, both fronts")] = 1024
    max_connections: Annotated[int, Field(ge=1, le=65_536, description="per front")] = 1024
    idle_timeout_ms: Annotated[int, Field(ge=1_000)] = 75_000
    """A connection that asks nothing for so long is closed."""
    keepalive_ms: Annotated[int, Field(ge=1_000, description="gRPC: a silent client is pinged")] = 60_000
    keepalive_timeout_ms: Annotated[int, Field(ge=100, description="and gone without an answer")] = 10_000
    stall_timeout_ms: Annotated[int, Field(ge=100, description="gRPC: an answer that is not read")] = 20_000
    max_streams: Annotated[int, Field(ge=1, le=65_536, description="per gRPC connection")] = 256
    min_ping_interval_ms: Annotated[int, Field(ge=0)] = 10_000
    read_timeout_ms: Annotated[int, Field(ge=1, description="for the body of a REST request")] = 10_000
    drain_timeout_ms: Annotated[int, Field(ge=0)] = 10_000
    max_versions: Annotated[int, Field(ge=1, le=64, description="open before another is loaded by hand")] = 4

    tier_ttl_s: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """For so long a user's tier is remembered before the store is asked again."""

    alias_poll_s: Annotated[float, Field(ge=0, le=3600)] = 2.0
    """How often the registry's alias is looked at, so that a release is noticed; 0: never."""
    check_requests: Annotated[int, Field(ge=0, le=10_000)] = 64
    """So many recent lists a version has to rank before it serves; 0 asks for none."""
    check_limit_ms: Annotated[int, Field(ge=1, description="for four of those lists, at the median")] = 2_000
    keep_previous: Annotated[int, Field(ge=0, le=1)] = 1
    """Versions before the serving one that stay open, so that a rollback takes effect at once."""
