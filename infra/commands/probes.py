"""Where a process that stays answers probes."""

from __future__ import annotations

import os
import socket

import click


def check_listens(host: str, port: int) -> None:
    """A port that cannot be had is a sentence now, before anything is started."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
    except OverflowError as error:
        why = str(error)
    else:
        return
    raise click.ClickException(
        f"probes cannot listen on {host}:{port} ({why}): --http-host and --http-port say where"
    )
