"""Options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import click

from infra.local.endpoints import endpoints
from infra.local.paths import registry_dir

Command = Callable[..., Any]
REDIS_SCHEMES: Final = ("redis", "rediss", "unix", "redis+cluster")


class FiniteRange(click.FloatRange):
    """A number within bounds; click itself takes `nan` for one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


def redis_address(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Refuses what is no address of a Redis, without repeating it: it may hold a password."""
    try:
        told = urlsplit(value or "redis:")
        good = told.scheme in REDIS_SCHEMES and (told.port is None or told.port > 0)
    except ValueError:
        good = False
    if not good:
        raise click.BadParameter("a Redis is named as redis://HOST:PORT/DATABASE", param=parameter)
    return value


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
        callback=redis_address,
        help="Redis, with its database number.",
    )(command)


def topic_suffix(command: Command) -> Command:
    """--topic-suffix, for environments that share a broker."""
    return click.option(
        "--topic-suffix", envvar="STREAM_TOPIC_SUFFIX", default="", help="Appended to every topic's name."
    )(command)


def registry(command: Command) -> Command:
    """--registry, else the environment, else the checkout's own."""
    return click.option(
        "--registry",
        type=click.Path(file_okay=False, path_type=Path),
        envvar=["TAILRACE_REGISTRY", "STREAM_REGISTRY"],
        show_envvar=True,
        default=registry_dir,
        show_default=".tailrace/models of the checkout",
        help="Folder of released models; `tailrace retrain` fills it.",
    )(command)


def seed(default: int = 1) -> Callable[[Command], Command]:
    """--seed: the same one draws the same numbers."""
    return click.option(
        "--seed", type=click.IntRange(0), default=default, show_default=True, help="Of all that is drawn."
    )


def workers(what: str) -> Callable[[Command], Command]:
    """--workers: how many processes serve."""
    return click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help=what)


def engine(command: Command) -> Command:
    """--engine, of a process that ranks."""
    return click.option(
        "--engine",
        envvar="INFERENCE_ENGINE",
        default="auto",
        show_default=True,
        help="See `tailrace engines`.",
    )(command)


def log_level(command: Command) -> Command:
    """--log-level, of a process that stays."""
    return click.option(
        "--log-level",
        type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"]),
        default="INFO",
        show_default=True,
    )(command)


def one_json(command: Command) -> Command:
    """--json, where a program would read what a command found."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)


def as_json(command: Command) -> Command:
    """--json, where a program would read line after line."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")(command)
