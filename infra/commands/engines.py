"""`tailrace engines`: which inference engines this machine can use."""

from __future__ import annotations

import dataclasses
import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="A list of JSON objects.")
def engines(as_json: bool) -> None:
    """Which engines are usable here, and why not.

    \b
    tailrace engines
    tailrace engines --json | jq -r '.[] | select(.usable) | .name'
    """
    from inference.engines import usable

    found = usable()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(engine) for engine in found]))
        return
    for engine in found:
        click.echo(f"{engine.name:<12} {'usable' if engine.usable else 'not usable':<11} {engine.why}")
