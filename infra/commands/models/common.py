"""What all commands about versions share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from compression.releases.registry import Registry

alias_option = click.option(
    "--alias", envvar="STREAM_ALIAS", default="serving", show_default=True, help="Whose versions these are."
)


def registry_of(root: Path) -> Registry:
    from compression.releases.registry import Registry

    return Registry(root)


@contextmanager
def sentences() -> Iterator[None]:
    """What is wrong with a version or a wish is a sentence, not a traceback."""
    from compression.errors import ArtefactInvalid, ReleaseRefused

    try:
        yield
    except (ArtefactInvalid, ReleaseRefused) as error:
        raise click.ClickException(str(error)) from None
