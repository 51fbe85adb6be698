"""`tailrace models`: the versions there are, who serves, who is tried, and going back.

`versions.py` shows and verifies them, `changes.py` says who serves and who is tried, `keys.py` signs.
"""

from __future__ import annotations

import click

from infra.commands.models import changes, keys, versions


@click.group()
def models() -> None:
    """Released versions: which there are, who serves, who is tried, and going back.

    A change is written into the registry's alias. Running workers and servers look at it every two
    seconds (STREAM_ALIAS_POLL_S, SERVE_ALIAS_POLL_S), load, check and switch without a restart;
    --bootstrap tells the workers at once, --server a server.

    \b
    tailrace models list
    tailrace models canary 20171203T101500-3f9c --percent 5 --bootstrap localhost:9092
    tailrace models promote 20171203T101500-3f9c --bootstrap localhost:9092
    tailrace models rollback --bootstrap localhost:9092
    """


for command in (*versions.commands, *changes.commands, *keys.commands):
    models.add_command(command)
