"""Telling inference servers, over their admin listeners, that the alias has moved."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Final

import orjson

# The answer comes when the version has been loaded, warmed and checked.
TIMEOUT_S: Final = 120.0


def refresh(servers: Sequence[str], version: str, sha256: str) -> list[str]:
    """Have each HOST:PORT look at its alias now; a sentence for each that did not take the change. Those
    notice it by themselves, if they can, within SERVE_ALIAS_POLL_S."""
    body = orjson.dumps({"version": version, "sha256": sha256})
    return [f"{server}: {why}" for server in servers if (why := _refresh(server, body))]


def _refresh(server: str, body: bytes) -> str | None:
    from inference.oip.admin import TOKEN_VARIABLE

    headers = {"Content-Type": "application/json"}
    if token := os.environ.get(TOKEN_VARIABLE):
        headers["Authorization"] = f"Bearer {token}"
    root = server if server.startswith(("http://", "https://")) else f"http://{server}"
    request = urllib.request.Request(f"{root}/refresh", body, headers)  # noqa: S310  # named by the operator
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            told = orjson.loads(answer.read())
    except urllib.error.HTTPError as error:
        return _sentence(error.read()) or str(error)
    except (OSError, ValueError) as error:
        return f"not told: {error}"
    return "; ".join(told["refused"].values()) or None


def _sentence(body: bytes) -> str | None:
    try:
        return str(orjson.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return None
