"""The admin listener: which versions are loaded, load, unload, metrics. Not for the network of clients.

    GET  /versions
    POST /load    {"version": VERSION or ALIAS, "sha256": MANIFEST'S, "serve": true}
    POST /unload  {"version": VERSION}
    GET  /metrics

With a token every request carries it: Authorization: Bearer TOKEN.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any, Final

import orjson
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from inference.errors import InvalidRequest
from inference.oip.rest import sentences
from inference.oip.versions import Versions

TOKEN_VARIABLE: Final = "TAILRACE_ADMIN_TOKEN"  # noqa: S105  # the name, not the token
_MAX_BODY_BYTES: Final = 16 * 1024
_MIN_TOKEN: Final = 16
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class AdminRefused(ValueError):
    """The listener would be open to strangers."""


def make_app(versions: Versions, host: str, token: str) -> web.Application:
    """The application for a host to listen on. Raises `AdminRefused` where it needs a token."""
    if not token and not _is_loopback(host):
        raise AdminRefused(f"the admin listener on {host} needs a token: set {TOKEN_VARIABLE}")
    if token and (len(token) < _MIN_TOKEN or not token.isascii()):
        raise AdminRefused(f"{TOKEN_VARIABLE} needs at least {_MIN_TOKEN} ASCII characters")
    admin = Admin(versions)
    app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[sentences, _guard(token)])
    app.add_routes(
        [
            web.get("/versions", admin.versions),
            web.post("/load", admin.load),
            web.post("/unload", admin.unload),
            web.get("/metrics", admin.metrics),
        ]
    )
    return app


class Admin:
    """Handlers of the paths."""

    def __init__(self, versions: Versions) -> None:
        self._versions = versions

    async def versions(self, request: web.Request) -> web.Response:
        return web.json_response(self._versions.listed())

    async def load(self, request: web.Request) -> web.Response:
        body = await _body(request, {"version": str, "sha256": str, "serve": bool})
        version = await self._versions.load(
            body["version"], sha256=body.get("sha256"), serve=body.get("serve", True)
        )
        return web.json_response({"loaded": version})

    async def unload(self, request: web.Request) -> web.Response:
        body = await _body(request, {"version": str})
        await self._versions.unload(body["version"])
        return web.json_response({"unloaded": body["version"]})

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _guard(token: str) -> Any:
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
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


async def _body(request: web.Request, fields: dict[str, type]) -> dict[str, Any]:
    """The JSON object of a request: these fields and no others, and a version."""
    try:
        body = orjson.loads(await request.read())
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict) or "version" not in body:
        raise InvalidRequest("the body is a JSON object with a version")
    for name, value in body.items():
        if name not in fields or not isinstance(value, fields[name]):
            raise InvalidRequest(f"{name[:64]!r} is not a field here, or not {' or '.join(fields)}")
    return body


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
