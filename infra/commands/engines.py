"""`tailrace engines`: which inference engines this machine can use."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="A list of JSON objects.")
def engines(as_json: bool) -> None:
    """Which engines are usable here, and why not: version, devices or providers, precisions on each.

    \b
    tailrace engines
    tailrace engines --json | jq -r '.[] | select(.usable) | .name'
    """
    from inference.engines import places, usable

    found: list[dict[str, Any]] = [
        {**dataclasses.asdict(engine), "places": places(engine.name) if engine.usable else {}}
        for engine in usable()
    ]
    if as_json:
        click.echo(json.dumps(found))
        return
    for engine in found:
        said = engine["why"]
        if engine["usable"]:
            where = "; ".join(f"{place}: {' '.join(can)}" for place, can in engine["places"].items())
            said = f"{engine['version']:<10} {where}"
        click.echo(f"{engine['name']:<10} {'usable' if engine['usable'] else 'not usable':<11} {said}")
