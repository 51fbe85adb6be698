"""`tailrace doctor`: what is missing here."""

from __future__ import annotations

import dataclasses
import json

import click

from infra.commands import options


@click.command()
@options.one_json
def doctor(as_json: bool) -> None:
    """What is missing on this machine, and how to get it. Ends with 1 where something needed is.

    \b
    tailrace doctor
    tailrace doctor --json | jq '.checks[] | select(.ok | not)'
    """
    from infra.doctor import checks

    found = checks()
    missing = [check for check in found if check.needed and not check.ok]
    if as_json:
        rows = [dataclasses.asdict(check) for check in found]
        click.echo(json.dumps({"ok": not missing, "checks": rows}))
    else:
        for check in found:
            mark = "ok" if check.ok else ("MISSING" if check.needed else "absent")
            click.echo(f"{mark:<8} {check.name:<13} {check.found}")
            if check.remedy:
                click.echo(f"{'':<22} {check.remedy}")
        names = ", ".join(check.name for check in missing)
        click.echo(f"\nmissing: {names}" if missing else "\nnothing needed is missing")
    if missing:
        raise SystemExit(1)
