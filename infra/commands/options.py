"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from infra.local.endpoints import endpoints

Command = Callable[..., Any]


def bootstrap(command: Command) -> Command:
    """--bootstrap, else the environment, else what `tailrace up` started."""
    return click.option(
        "--bootstrap",
        default=lambda: endpoints().bootstrap,
        show_default="what `tailrace up` started",
        help="Kafka's host:port list.",
    )(command)


def redis_url(command: Command) -> Command:
    """--redis-url, likewise."""
    return click.option(
        "--redis-url",
        default=lambda: endpoints().redis_url,
        show_default="what `tailrace up` started",
        help="Redis, with its database number.",
    )(command)


def topic_suffix(command: Command) -> Command:
    """--topic-suffix, for environments that share a broker."""
    return click.option(
        "--topic-suffix", envvar="STREAM_TOPIC_SUFFIX", default="", help="Appended to every topic's name."
    )(command)


def as_json(command: Command) -> Command:
    """--json, where a program would read the output."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")(command)
