"""Settings of the environment, and a sentence for each that is wrong."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import click
from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsError

S = TypeVar("S", bound=BaseSettings)


def read(kind: type[S], **given: Any) -> S:
    """What the environment says, and `given` over it. A value that does not parse is a
    `click.ClickException` that names its variable."""
    try:
        told = kind()
        return kind.model_validate({**told.model_dump(), **given}) if given else told
    except ValidationError as error:
        found = error.errors(include_url=False)
        # Of a list one of whose parts is wrong, pydantic also says that it is short.
        inner = [one for one in found if not any(_within(other["loc"], one["loc"]) for other in found)]
        sentences = [_sentence(kind, one) for one in inner]
    except SettingsError as error:
        # Its message names the field between quotes and keeps what is wrong with the value to its cause.
        field = re.search(r'field "(\w+)"', str(error))
        sentences = [f"{_variable(kind, (field[1] if field else '*',))} is not JSON: {error.__cause__}"]
    raise click.ClickException("\n  ".join(["a setting is wrong:", *sentences]))


def _sentence(kind: type[BaseSettings], found: Any) -> str:
    why = found["msg"].removeprefix("Value error, ").removeprefix("Input ")
    # A rule about several settings: its sentence says which.
    if found["type"] == "value_error" or not found["loc"]:
        return f"{_variable(kind, found['loc'] or ('*',))}: {why}"
    return f"{_variable(kind, found['loc'])} {why}, not {found['input']!r:.100}"


def _within(place: tuple[Any, ...], whole: tuple[Any, ...]) -> bool:
    return len(place) > len(whole) > 0 and place[: len(whole)] == whole


def _variable(kind: type[BaseSettings], place: tuple[Any, ...]) -> str:
    field, *rest = map(str, place)
    return ".".join([f"{kind.model_config.get('env_prefix', '')}{field}".upper(), *rest])
