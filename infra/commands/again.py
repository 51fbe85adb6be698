"""A command's own line once more, for processes that it starts."""

from __future__ import annotations

import sys

import click


def again(*left_out: str) -> list[str]:
    """The command at work with the options it was given, on its line or in the environment, but those
    `left_out` (by their parameters' names): they are the caller's matter, or nobody's to read."""
    context = click.get_current_context()
    words = [sys.executable, "-m", "infra.cli", str(context.command.name)]
    for option in context.command.params:
        name = str(option.name)
        source = context.get_parameter_source(name)
        if name in left_out or source in (None, click.core.ParameterSource.DEFAULT):
            continue
        value = context.params[name]
        if isinstance(option, click.Option) and option.is_flag:
            words += [option.opts[0]] if value else []
        else:
            for one in value if isinstance(value, tuple) else [value]:
                words += [option.opts[0], str(one)]
    return words
