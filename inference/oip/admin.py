"""The admin listener: releases, versions loaded by hand, metrics. Not for the network of clients.

    GET  /versions  what is open
    GET  /releases  what the alias stands for here, and what comparing versions has found
    POST /refresh   {"version": ANNOUNCED, "sha256": MANIFEST'S} or {}: look at the alias now
    POST /load      {"version": VERSION or ALIAS, "sha256": MANIFEST'S, "serve": true}
    POST /unload    {"version": VERSION}
    GET  /metrics

What is loaded by hand serves until the alias changes; with "serve": false it answers those who ask for
that version. With a token every request carries it: Authorization: Bearer TOKEN.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import orjson
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from inference.errors import InvalidRequest
from inference.oip.rest import sentences
from inference.oip.settings import ServeSettings
from inference.releases.serving import ServingModel

TOKEN_VARIABLE: Final = "TAILRACE_ADMIN_TOKEN"  # noqa: S105  # the name, not the token
_MAX_BODY_BYTES: Final = 16 * 1024
_MIN_TOKEN: Final = 16
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class AdminRefused(ValueError):
    """The listener would be open to strangers."""


def make_app(
    releases: ServingModel, metrics: CollectorRegistry, settings: ServeSettings, token: str
) -> web.Application:
    """The application for its host to listen on. Raises `AdminRefused` where that needs a token."""
    host = settings.admin_host
    if not token and not is_loopback(host):
        raise AdminRefused(f"the admin listener on {host} needs a token: set {TOKEN_VARIABLE}")
    if token and (len(token) < _MIN_TOKEN or not token.isascii()):
        raise AdminRefused(f"{TOKEN_VARIABLE} needs at least {_MIN_TOKEN} ASCII characters")
    admin = Admin(releases, metrics, settings.max_versions)
    app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[sentences, _guard(token)])
    app.add_routes(
        [
            web.get("/versions", admin.versions),
            web.get("/releases", admin.releases),
            web.post("/refresh", admin.refresh),
            web.post("/load", admin.load),
            web.post("/unload", admin.unload),
            web.get("/metrics", admin.metrics),
        ]
    )
    return app


class Admin:
    """Handlers of the paths."""

    def __init__(self, releases: ServingModel, metrics: CollectorRegistry, most: int) -> None:
        self._releases = releases
        self._metrics = metrics
        self._most = most

    async def versions(self, request: web.Request) -> web.Response:
        return web.json_response(self._releases.listed())

    async def releases(self, request: web.Request) -> web.Response:
        return web.json_response(self._releases.describe())

    async def refresh(self, request: web.Request) -> web.Response:
        body = await _body(request, {"version": str, "sha256": str}, needs=())
        changed = await self._releases.load(body.get("version"), body.get("sha256"))
        return web.json_response({"changed": changed, **self._releases.describe()})

    async def load(self, request: web.Request) -> web.Response:
        body = await _body(request, {"version": str, "sha256": str, "serve": bool})
        name, sha256 = body["version"], body.get("sha256")
        if body.get("serve", True):
            version = await self._releases.serve(name, sha256)
        else:
            version = await self._releases.pin(name, sha256, most=self._most)
        return web.json_response({"loaded": version})

    async def unload(self, request: web.Request) -> web.Response:
        body = await _body(request, {"version": str})
        await self._releases.unpin(body["version"])
        return web.json_response({"unloaded": body["version"]})

    async def metrics(self, request: web.Request) -> web.Response:
        text = generate_latest(self._metrics) + generate_latest()
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})


def _guard(token: str) -> Any:
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not token and not is_loopback(request.url.host or ""):
            # A page whose name was bent to this machine is of the same origin, and may send any type.
            raise web.HTTPForbidden(text="without a token this is asked for at a loopback address")
        given = request.headers.get("Authorization", "").encode()
        if token and not hmac.compare_digest(given, b"Bearer " + token.encode()):
            raise web.HTTPUnauthorized(
                text="this needs Authorization: Bearer TOKEN", headers={"WWW-Authenticate": "Bearer"}
            )
        # A page in a browser on this machine can post without asking, but not this type.
        if request.method == "POST" and request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType(text="the body is application/json")
        return await handler(request)

    return guard


async def _body(
    request: web.Request, fields: dict[str, type], needs: Sequence[str] = ("version",)
) -> dict[str, Any]:
    """The JSON object of a request: these fields and no others."""
    try:
        body = orjson.loads(await request.read())
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict) or any(name not in body for name in needs):
        raise InvalidRequest(" with a ".join(("the body is a JSON object", *needs)))
    for name, value in body.items():
        if name not in fields or not isinstance(value, fields[name]):
            raise InvalidRequest(f"{name[:64]!r} is not a field here, or not {' or '.join(fields)}")
    return body


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
